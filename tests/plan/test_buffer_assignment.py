"""What lies in memory when, from XLA's dump of a buffer assignment."""

import pytest

from jfe_jax.plan.buffer_assignment import BufferAssignment, describe_buffer

NAME = "module_0000.jit_step.after_optimizations"
MIB = 2**20
# An argument; two temporaries in one place after each other, one in place of the other; one of the loss beside them,
# with an on-chip copy; and a result.
ASSIGNMENT = f"""BufferAssignment:
allocation 0: size {8 * MIB}, parameter 0, shape |f32[2,1024,1024]| at ShapeIndex {{}}:
 value: <0 weights.1 @0> (size={8 * MIB},offset=0): f32[2,1024,1024]{{2,1,0:T(8,128)}}
allocation 1: size 512, thread-local:
 value: <1 add.1 @0> (size=512,offset=0): f32[]{{:T(256)}}
allocation 2: size {6 * MIB}, preallocated-temp:
 value: <2 fusion.1{{1}} @0> (size={4 * MIB},offset=0): f32[1024,1024]{{1,0:T(8,128)}}
 value: <3 update.1 @0> (size={4 * MIB},offset=0): f32[1024,1024]{{1,0:T(8,128)}}
 value: <4 logits.1 @0> (size={2 * MIB},offset={4 * MIB}): f32[512,1024]{{1,0:T(8,128)}}
allocation 3: size {MIB}, maybe-live-out:
 value: <5 out.1 @0> (size={MIB},offset=0): f32[256,1024]{{1,0:T(8,128)}}
allocation 4: size {3 * MIB}, color 1, preallocated-temp:
 value: <6 copy.1 @1> (size={2 * MIB},offset=0): f32[512,1024]{{1,0:T(8,128)S(1)}}
 value: <7 tile.1 @1> (size={MIB},offset={2 * MIB}): f32[256,1024]{{1,0:T(8,128)S(1)}}
"""
RANGES = """HloLiveRange (max 10):
  InstructionSequence:
    0:weights.1
  BufferLiveRange:
    weights.1{}:0-10
    fusion.1{1}:1-3
    update.1{}:3-8
    logits.1{}:4-6
    copy.1{}:4-5
    tile.1{}:6-7
    out.1{}:9-10
  Live ranges at 4 (peak):
    weights.1{}: 8388608 bytes (cumulative: 8388608 bytes)
"""
HLO = """ENTRY %main (weights.1: f32[2,1024,1024]) -> f32[256,1024] {
  %weights.1 = f32[2,1024,1024]{2,1,0} parameter(0), metadata={op_name="state.params[\\\\'tower\\\\'][\\\\'norm\\\\']"}
  %fusion.1 = (f32[], f32[1024,1024]{1,0}) fusion(%weights.1), metadata={op_name="jit(step)/tower/while/body/up_df/dot"}
  %update.1 = f32[1024,1024]{1,0} dynamic-update-slice(%fusion.1), metadata={op_name="jit(step)/tower/lossless/dot"}
  %logits.1 = f32[512,1024]{1,0} fusion(%update.1), metadata={op_name="jit(step)/transpose(jvp(loss))/dot"}
  %copy.1 = f32[512,1024]{1,0} fusion(%logits.1), metadata={op_name="jit(step)/jvp(loss)/shard_map/exp"}
  %tile.1 = f32[256,1024]{1,0} fusion(%logits.1), metadata={op_name="jit(step)/jvp(loss)/shard_map/sum"}
  ROOT %out.1 = f32[256,1024]{1,0} fusion(%update.1)
}
"""


@pytest.fixture
def folder(tmp_path):
    for suffix, text in (("-buffer-assignment", ASSIGNMENT), ("-live-range", RANGES), ("", HLO)):
        (tmp_path / f"{NAME}{suffix}.txt").write_text(text)
    return tmp_path


def test_bytes_are_counted_by_place_while_they_live(folder):
    buffers = BufferAssignment.read(folder)
    # The argument and, of 4 + 4 + 2 MiB of temporaries, those of two places.
    assert buffers.peak(lambda value: value.space == 0) == (14 * MIB, 4)
    assert [value.size // MIB for value in buffers.largest(3)] == [8, 4, 2]
    assert [describe_buffer(value) for value in buffers.largest(2)] == [
        "0.01 GiB f32[2,1024,1024] (state.params.tower.norm)",
        "0.00 GiB f32[1024,1024] (tower/lossless)",
    ]


def test_the_temporaries_of_a_part_of_the_program(folder):
    buffers = BufferAssignment.read(folder)
    assert buffers.temporaries("loss") == 2 * MIB
    # Not at the same time.
    assert buffers.temporaries("loss", space=1) == 2 * MIB
    assert buffers.temporaries("tower") == 4 * MIB
    assert buffers.temporaries("state") == buffers.temporaries("vision") == 0


def test_a_program_without_an_assignment_has_none(folder):
    (folder / f"{NAME}-live-range.txt").unlink()
    assert BufferAssignment.read(folder) is None
