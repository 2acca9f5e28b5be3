"""Settings: what a file and the command line mean, and one clear line for each mistake."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import pytest
from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from fwasync import InfraConfig, WandBConfig
from fwasync.cli.settings import Settings
from fwasync.cli.template import template
from fwasync.errors import UsageError


def _even(value: int) -> int:
    if value % 2:
        raise ValueError("It is odd")
    return value


class Adam(BaseModel):
    """A section of our own, without the house's base."""

    model_config = ConfigDict(extra="forbid")

    beta1: float = 0.9
    eps: float = 1e-8


class Config(BaseModel):
    """A recipe's settings."""

    model_config = ConfigDict(extra="forbid")

    log_path: Path
    dataset: str = Field(default="", description="A file.")
    learning_rate: float = 1e-4
    max_steps: int | None = None
    shuffle: bool = True
    policy_loss: Literal["grpo", "dapo", "gspo"] = "grpo"
    batch_size: Annotated[int, AfterValidator(_even)] = 4
    tags: list[str] | None = None
    adam: Adam | None = Adam()
    infra: InfraConfig = InfraConfig()
    wandb: WandBConfig = WandBConfig(project="here")


def built(*arguments: str, file: Path | None = None) -> Config:
    settings = Settings.read(file)
    settings.put_default("log_path", "runs/x")
    settings.override(arguments, Config)
    return settings.build(Config)


@pytest.mark.parametrize(
    ("arguments", "name", "value"),
    [
        (["learning_rate=3e-5"], "learning_rate", 3e-5),
        (["--learning-rate", "3e-5"], "learning_rate", 3e-5),
        (["--learning-rate=.5"], "learning_rate", 0.5),
        (["learning_rate=1", "--learning-rate", "2"], "learning_rate", 2.0),
        (["max_steps=none"], "max_steps", None),
        (["--steps", "7"], "max_steps", 7),
        (["--shuffle", "false"], "shuffle", False),
        (["--shuffle", "--max-steps=1"], "shuffle", True),
        (["dataset=123"], "dataset", "123"),
        (["dataset=a=b.jsonl"], "dataset", "a=b.jsonl"),
        (["--data", "none"], "dataset", "none"),
        (["policy_loss=dapo"], "policy_loss", "dapo"),
        (['tags=["a", "b"]'], "tags", ["a", "b"]),
        (["log_path=a b"], "log_path", Path("a b")),
        (["adam.eps=1e-12"], "adam", Adam(eps=1e-12)),
        (["adam={beta1 = 0.5}"], "adam", Adam(beta1=0.5)),
        (["adam=none"], "adam", None),
        (["infra.region=EU"], "infra", InfraConfig(region="EU")),
        (["--infra.trainer-timeout-s", "60"], "infra", InfraConfig(trainer_timeout_s=60)),
        (["wandb.entity=team"], "wandb", WandBConfig(entity="team", project="here")),
        (["wandb.project=none"], "wandb", WandBConfig()),
    ],
)
def test_the_model_says_what_a_value_is(arguments: list[str], name: str, value: object) -> None:
    assert getattr(built(*arguments), name) == value


def test_the_command_line_goes_before_the_file(tmp_path: Path) -> None:
    file = tmp_path / "run.toml"
    file.write_text(
        'learning_rate = 1\nbatch_size = 8\n[infra]\nregion = "EU"\ntrainer_timeout_s = 9\n[adam]\neps = 2\n'
    )
    config = built("learning_rate=2", "infra.region=US", "adam.eps=1", file=file)
    assert (config.learning_rate, config.batch_size) == (2, 8)
    assert config.infra == InfraConfig(region="US", trainer_timeout_s=9)
    assert config.adam == Adam(eps=1)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["lerning_rate=1"], "lerning_rate: there is no setting 'lerning_rate'; did you mean 'learning_rate'?"),
        (["--infra.regoin", "x"], "--infra.regoin: there is no setting 'infra.regoin'; did you mean 'region'?"),
        (["adam.lr=1"], "adam.lr: there is no setting 'adam.lr'; there are: beta1, eps"),
        (["--batch-size", "many"], "--batch-size is many: input should be a valid integer"),
        (["batch_size=3"], "batch_size is 3: it is odd"),
        (["policy_loss=grop"], "policy_loss is grop: input should be 'grpo', 'dapo' or 'gspo'; did you mean 'grpo'?"),
        (["infra.trainer_timeout_s=-1"], "infra.trainer_timeout_s is -1: input should be greater than 0"),
        (["batch_size"], "'batch_size' is no setting: write name=value, or --name value"),
        (["-x"], "'-x' is no setting: write name=value, or --name value"),
    ],
)
def test_a_mistake_on_the_command_line_is_one_line(arguments: list[str], told: str) -> None:
    with pytest.raises(UsageError) as caught:
        built(*arguments)
    assert str(caught.value).startswith(told)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("batch_size = 2\n\n# hm\nlerning_rate = 1\n", ":4: there is no setting 'lerning_rate'; did you mean"),
        ("batch_size = [\n  1,\n]\n", ":1: batch_size is [1]: input should be a valid integer"),
        ("[infra]\nregion = 'x'\nregoin = 'EU'\n", ":3: there is no setting 'infra.regoin'; did you mean 'region'?"),
        ("infra.region = 1\n", ":1: infra.region is 1: input should be a valid string"),
        ("a = \n", ", line 1, column 5: invalid value"),
        ("a = 1\na = 2\n", ", line 2, column 6: cannot overwrite a value"),
        ("[infra\n", ", line 1, column 7: expected ']' at the end of a table declaration"),
        ("a = '''\n\n", ", line 2: "),
        (b"a = '\xff'", " is not UTF-8 text: byte 5 is 0xff"),
    ],
)
def test_a_mistake_in_the_file_is_told_with_its_line(text: str | bytes, told: str, tmp_path: Path) -> None:
    file = tmp_path / "run.toml"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UsageError) as caught:
        built(file=file)
    assert str(caught.value).startswith(f"{file}{told}")
    assert "\n" not in str(caught.value)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"none\.toml: there is no such file"):
        Settings.read(tmp_path / "none.toml")
    with pytest.raises(UsageError, match="cannot be read: Is a directory"):
        Settings.read(tmp_path)


def test_several_mistakes_are_told_at_once(tmp_path: Path) -> None:
    file = tmp_path / "run.toml"
    file.write_text("batch_size = 3\n")
    with pytest.raises(UsageError) as caught:
        built("learning_rate=fast", file=file)
    first, *others = str(caught.value).splitlines()
    assert first == "several settings cannot be:"
    assert sorted(line.strip().partition(" is ")[0] for line in others) == [f"{file}:1: batch_size", "learning_rate"]


def test_what_must_be_set_and_is_not() -> None:
    with pytest.raises(UsageError, match="log_path must be set as name=value"):
        Settings().build(Config)


def test_a_template_names_everything_and_is_a_file_to_start_from(tmp_path: Path) -> None:
    class Recipe(Config):
        """With something that has no default."""

        base_model: str

    text = template("mine", Recipe)
    assert '# A file.\n# dataset = ""\n' in text
    assert 'base_model = ""  # must be set\n' in text
    assert "[infra]\n" in text
    assert "# region = (unset)\n" in text
    assert "accelerator_type" not in text  # not for users
    assert '# project = "here"\n' in text
    file = tmp_path / "run.toml"
    uncommented = text.replace("# learning_rate =", "learning_rate =").replace("# max_steps = (unset)", "max_steps = 7")
    file.write_text(uncommented)
    settings = Settings.read(file)
    settings.put_default("log_path", "x")
    assert settings.build(Recipe) == Recipe(log_path=Path("x"), base_model="", max_steps=7)


def test_a_part_of_what_was_given_as_a_whole_is_refused(tmp_path: Path) -> None:
    (tmp_path / "run.toml").write_text("adam = 'fast'\n")
    with pytest.raises(UsageError, match=r"^--adam\.beta1: adam is 'fast', of which no part can be changed; give all"):
        built("--adam.beta1", "0.5", file=tmp_path / "run.toml")


def test_a_file_may_begin_with_a_byte_order_mark(tmp_path: Path) -> None:
    (tmp_path / "run.toml").write_text("batch_size = 8\n", encoding="utf-8-sig")
    assert built(file=tmp_path / "run.toml").batch_size == 8
