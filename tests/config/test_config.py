"""Configs: files, bases, overrides, and what is said of mistakes."""

import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import yaml

from jfe_jax import config as configs
from jfe_jax.cli.main import main
from jfe_jax.config import Config, ModelConfig, TokensConfig
from jfe_jax.errors import UserError

SHIPPED = sorted(Path("configs").rglob("*.yaml"))


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def test_an_empty_file_is_the_defaults(tmp_path):
    assert configs.load(write(tmp_path / "c.yaml", "")) == Config()


def test_what_is_written_out_reads_back_the_same(tmp_path):
    config = replace(
        Config(),
        data=replace(Config().data, mixture={"a_task0": 1.0}),
        optimizer=replace(Config().optimizer, freeze=("vision",), learning_rate=1e-5),
    )
    assert configs.load(write(tmp_path / "c.yaml", configs.to_yaml(config))) == config


def test_bases_come_first_in_order_and_the_file_last(tmp_path):
    write(tmp_path / "one.yaml", "seed: 1\noutput: one\ndata: {pairs: 10, rows: 11, mixture: {a_task0: 1}}")
    write(tmp_path / "two.yaml", "seed: 2\ndata: {pairs: 20}")
    config = configs.load(write(tmp_path / "c.yaml", "base: [one.yaml, two.yaml]\ndata: {mixture: {b_task1: 2}}"))
    assert (config.seed, config.output) == (2, "one")
    assert (config.data.pairs, config.data.rows, config.data.mixture) == (20, 11, {"b_task1": 2.0})


def test_overrides_win_and_are_read_as_yaml(tmp_path):
    overrides = ["--optimizer.learning_rate=1e-3", "data.shuffle=false", "--optimizer.freeze=[vision]", "--init="]
    config = configs.load(write(tmp_path / "c.yaml", "data: {pairs: 8}\ninit: there"), overrides)
    assert (config.optimizer.learning_rate, config.data.shuffle, config.data.pairs) == (1e-3, False, 8)
    assert (config.optimizer.freeze, config.init) == (("vision",), "")


@pytest.mark.parametrize(
    "text, says",
    [
        ("modle: {}", "unknown key modle; did you mean model"),
        ("optimizer: {learning_rat: 1}", r"unknown key optimizer\.learning_rat; did you mean optimizer\.learning_rate"),
        ("lerning_rate: 1", "unknown key lerning_rate; did you mean .*learning_rate"),
        ("data: 3", "data is a section"),
        ("data: {pairs: many}", r"data\.pairs is 'many'; it has to be int"),
        ("data: {pairs: 1.5}", r"data\.pairs is 1\.5; it has to be int"),
        ("loss: {temperature: warm}", r"loss\.temperature is 'warm'; it has to be a number"),
        ("loss: {temperature: true}", r"loss\.temperature is True; it has to be a number"),
        ("model: {kind: three}", r"model\.kind is 'three'; it has to be one of fusion, two_tower"),
        ("[1]", "a config is a tree of keys and values"),
        ("a: [", "not YAML"),
        ("base: nowhere.yaml", r"nowhere\.yaml: cannot read the config"),
    ],
)
def test_mistakes_are_one_line_that_names_them(tmp_path, text, says):
    with pytest.raises(UserError, match=says) as caught:
        configs.load(write(tmp_path / "c.yaml", text))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "override, says",
    [
        ("--data.pairs", "write --key.sub=value"),
        ("--seed.x=1", "'seed' is a value, not a section"),
        ("--data.pairs=[", "override '--data.pairs=\\['"),
        ("--data.pair=1", r"unknown key data\.pair; did you mean data\.pairs"),
    ],
)
def test_wrong_overrides_are_named(tmp_path, override, says):
    with pytest.raises(UserError, match=says):
        configs.load(write(tmp_path / "c.yaml", "seed: 1"), [override])


def test_widths_come_back_from_json_and_the_file_replaces_the_bases(tmp_path):
    write(tmp_path / "base.yaml", "loss: {matryoshka: {8: 1, 16: 0.5}}")
    config = configs.load(write(tmp_path / "c.yaml", "base: base.yaml\nloss: {matryoshka: {64: 1}}"))
    assert config.loss.matryoshka == {64: 1.0}
    assert configs.from_dict(json.loads(json.dumps(asdict(config)))) == config
    with pytest.raises(UserError, match=r"loss\.matryoshka is {'wide': 1}; its keys have to be whole numbers"):
        configs.load(tmp_path / "c.yaml", ["loss.matryoshka={wide: 1}"])


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(UserError, match=r"c\.yaml: cannot read the config \(No such file"):
        configs.load(tmp_path / "c.yaml")


def test_the_template_has_to_agree_with_the_newline():
    with pytest.raises(UserError, match="set it to 2"):
        Config(model=ModelConfig(kind="two_tower"), tokens=TokensConfig(newline=False))


def test_differing_keys_are_dotted():
    one = Config()
    other = replace(one, model=replace(one.model, text=replace(one.model.text, width=64), pooling="mean"))
    assert configs.differing_keys(one, other) == ["model.pooling: last != mean", "model.text.width: 2048 != 64"]
    assert configs.differing_keys(one, one) == []


@pytest.mark.parametrize("path", SHIPPED, ids=str)
def test_shipped_configs_have_no_unknown_key(path):
    if "output" in yaml.safe_load(path.read_text()):
        configs.load(path)


def test_the_resolved_config_is_printed(tmp_path, capsys):
    file = write(tmp_path / "c.yaml", "data: {pairs: 8}")
    assert main(["train", "--config", str(file), "--print-config", "--data.rows=4"]) == 0
    printed = configs.from_dict(yaml.safe_load(capsys.readouterr().out))
    assert printed == configs.load(file, ["--data.rows=4"])


def test_a_wrong_config_is_one_line_and_status_1(tmp_path, capsys):
    file = write(tmp_path / "c.yaml", "modle: {}")
    assert main(["train", "--config", str(file)]) == 1
    assert capsys.readouterr().err == f"jfe train: {file}: unknown key modle; did you mean model?\n"


def test_a_key_twice_is_refused_with_both_lines(tmp_path):
    text = "optimizer:\n  learning_rate: 1e-3\nseed: 1\noptimizer:\n  name: adamw\n"
    with pytest.raises(UserError, match=r"c\.yaml: key 'optimizer' is there twice, in lines 1 and 4"):
        configs.load(write(tmp_path / "c.yaml", text))
    with pytest.raises(UserError, match=r"key 'steps' is there twice, in lines 1 and 1"):
        configs.load(write(tmp_path / "c.yaml", "optimizer: {steps: 1, steps: 2}"))
    with pytest.raises(UserError, match="key 64 is there twice"):
        configs.load(write(tmp_path / "c.yaml", ""), ["--loss.matryoshka={64: 1, 64: 2}"])


@pytest.mark.parametrize(
    "text, seed",
    [("010", 10), ("-3", -3), ("1_000", 1000), ("0", 0), ("08", 8)],
)
def test_numbers_are_decimal(tmp_path, text, seed):
    assert configs.load(write(tmp_path / "c.yaml", f"seed: {text}")).seed == seed
    assert configs.load(write(tmp_path / "c.yaml", ""), [f"--seed={text}"]).seed == seed


@pytest.mark.parametrize(
    "text, says",
    [
        ("seed: true", "seed is True; it has to be int"),
        ("seed: 0x10", "seed is '0x10'; it has to be int"),
        ("seed: 1:30", "seed is '1:30'; it has to be int"),
        ("data: {bins: {64: true}}", r"data\.bins\.64 is True"),
        ("optimizer: {learning_rate: .nan}", r"optimizer\.learning_rate is nan; it has to be a number"),
        ("optimizer: {learning_rate: -.inf}", "has to be a number"),
        ("data: {shuffle: no}", r"data\.shuffle is 'no'; it has to be bool"),
        ("output: 7", "output is 7; it has to be text: write it in quotes"),
        ("optimizer:\n\tname: adamw", "not YAML"),
        ("base: 3", "base is 3; it has to be a file's path"),
        ("base: c.yaml", "is its own base"),
        ("? [a]\n: 1", "a key has to be a word or a number"),
        ("data: " + "[" * 5000, "not"),
    ],
)
def test_values_that_yaml_1_1_would_read_as_something_else_are_refused(tmp_path, text, says):
    with pytest.raises(UserError, match=says) as caught:
        configs.load(write(tmp_path / "c.yaml", text))
    assert "\n" not in str(caught.value) and "c.yaml" in str(caught.value)


def test_dates_and_words_stay_text(tmp_path):
    config = configs.load(write(tmp_path / "c.yaml", "output: 2026-12-01\ninit: no\ndata: {mixture: {on: 1e-3}}"))
    assert (config.output, config.init, config.data.mixture) == ("2026-12-01", "no", {"on": 1e-3})


@pytest.mark.parametrize("value", ["/a #b", "010", "true", "[x", "a: b", "'quoted'", "~", " spaced "])
def test_an_override_of_a_text_field_is_that_text(tmp_path, value):
    file = write(tmp_path / "c.yaml", "")
    assert configs.load(file, [f"--output={value}"]).output == value
    assert configs.load(file, [f"--tokens.tokenizer={value}"]).tokens.tokenizer == value


@pytest.mark.parametrize("encoding, readable", [("utf-8-sig", True), ("utf-16", False), ("latin-1", False)])
def test_files_in_other_encodings_are_read_or_named(tmp_path, encoding, readable):
    file = tmp_path / "c.yaml"
    file.write_bytes("# é\nseed: 1\n".encode(encoding))
    if readable:
        assert configs.load(file).seed == 1
    else:
        with pytest.raises(UserError, match=r"c\.yaml: not UTF-8 text \(byte \d+\)"):
            configs.load(file)


@pytest.mark.parametrize("text", ["010", "no", "1e-5", "1:30", "~", "2026-12-01", "0x10", "a: b", "#", "é", ".5", ""])
def test_what_is_printed_reads_back_in_both_versions_of_yaml(tmp_path, text):
    config = replace(Config(), output=text)
    written = configs.to_yaml(config)
    assert configs.load(write(tmp_path / "c.yaml", written)) == config
    assert yaml.safe_load(written)["output"] == text
