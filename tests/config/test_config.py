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
