"""Whatever a recipe or an option holds, the answer is a configuration or a list of what is wrong with it."""

from __future__ import annotations

import datetime
from dataclasses import dataclass
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from visionkd.config.load import build_options, dump_config, load_config, options_problems
from visionkd.config.plain import MAX_DEPTH, MAX_VALUES, plain
from visionkd.config.schema import DistillConfig, RunConfig, TrainConfig
from visionkd.errors import Problem, RequestError

KINDS = (DistillConfig, TrainConfig, RunConfig)
MINIMAL = {
    DistillConfig: {"student": {"name": "a"}, "teachers": [{"name": "b"}]},
    TrainConfig: {"model": {"name": "a"}},
}
SPELLED = {"optimizer.lr": "--lr", "training.epochs": "--epochs", "export.formats": "--export", "teachers": "--teacher"}


@dataclass(frozen=True)
class Options:
    temperature: float = 4.0
    hard: bool = False

    def __post_init__(self) -> None:
        if self.temperature <= 0:
            raise ValueError("Temperature must be above 0")


def method_options(name: str) -> type | None:
    return Options if name in ("kd", "auto") else None


def load(kind: type[RunConfig] = TrainConfig, text: str | None = None, *options: str, **more: Any) -> Any:
    text = yaml.safe_dump(MINIMAL[kind]) if text is None and kind in MINIMAL else text
    return load_config(kind, text=text, where="mine.yaml", options=options, method_options=method_options, **more)


def problems(kind: type[RunConfig] = TrainConfig, text: str | None = None, *options: str, **more: Any) -> list[str]:
    with pytest.raises(RequestError) as caught:
        load(kind, text, *options, **more)
    assert caught.value.problems and all(problem.key for problem in caught.value.problems)
    return list(map(str, caught.value.problems))


def test_values_come_from_defaults_recipe_overrides_and_options_in_this_order() -> None:
    text = "model: {name: a}\ntraining: {epochs: 3, seed: 5, batch_size: 8}\n"
    config = load(
        TrainConfig, text, "training.seed=7", overrides={"training.seed": 6, "training.epochs": 4, "task": None}
    )
    assert (config.training.epochs, config.training.seed, config.training.batch_size) == (4, 7, 8)
    assert config.task == "auto" and config.training.precision == "32"


def test_everything_wrong_is_listed_at_once_with_key_value_and_what_is_allowed() -> None:
    text = "model: {name: a, nmae: b}\ntraining: {epochs: 0, precision: 64}\nlr: 1\nepoch: 2\n"
    found = problems(TrainConfig, text, "noequals", "data.cache=disk", "compute.devices=x")
    assert set(found) == {
        "-o noequals: is not of the form KEY=VALUE. Example: -o training.epochs=5",
        "training.epochs: must be greater than or equal to 1 (given: 0)",
        "training.precision: must be '32', 'bf16' or '16' (given: '64')",
        "data.cache: must be 'auto', 'ram' or 'none' (given: 'disk')",
        "compute.devices: must be a valid integer or 'auto' (given: 'x')",
        "model.nmae: unknown key (given: 'b'). Did you mean 'name'?",
        "lr: unknown key (given: 1). Did you mean 'optimizer.lr'?",
        "epoch: unknown key (given: 2). Did you mean 'training.epochs'?",
    }


def test_a_key_of_a_list_item_is_answered_with_its_neighbours() -> None:
    (found,) = problems(DistillConfig, "student: {name: a}\nteachers: [{name: b, precison: '32'}]\n")
    assert found == "teachers.0.precison: unknown key (given: '32'). Did you mean 'precision'?"


def test_a_missing_key_names_the_option() -> None:
    assert problems(DistillConfig, "") == [
        "student: is required. Give --student NAME, such as --student resnet50",
        "teachers: is required. Give --teacher NAME, such as --teacher vit_l",
    ]
    assert "--model NAME" in problems(TrainConfig, None, "model={}")[0]


def test_a_section_that_is_given_a_value() -> None:
    (found,) = problems(TrainConfig, None, "training=5")
    assert found.startswith(
        "training: is a section with keys of its own (given: 5). Set one of its keys, such as training."
    )


def test_the_option_that_was_typed_stands_beside_the_key() -> None:
    given = {"optimizer.lr": -1.0, "training.epochs": 0, "export.formats": ["onx"], "teachers": [{"name": 3}]}
    found = problems(DistillConfig, "student: {name: a}", overrides=given, spelled=SPELLED)
    assert {line.split(": ")[0] for line in found} == {
        "--lr (optimizer.lr)",
        "--epochs (training.epochs)",
        "--export (export.formats.0)",
        "--teacher (teachers.0.name)",
    }
    (found,) = problems(TrainConfig, None, "optimizer.lr=-2", overrides={"optimizer.lr": 1.0}, spelled=SPELLED)
    assert found.startswith("optimizer.lr: "), "-o won, and names the key itself"
    (found,) = problems(TrainConfig, "model: {name: a}\noptimizer: {lr: -1}", spelled=SPELLED)
    assert found.startswith("optimizer.lr: "), "the recipe holds it"


def test_further_checks_are_listed_with_the_rest_and_see_what_was_overridden() -> None:
    seen = []

    def check(values: Any) -> list[Problem]:
        seen.append(values)
        return [Problem("training.epochs", "are too many"), Problem("model.name", "is unknown")]

    found = problems(TrainConfig, None, "data.cache=x", overrides={"training.epochs": 9}, spelled=SPELLED, check=check)
    assert [line.split(":")[0] for line in found] == ["data.cache", "--epochs", "model.name"]
    assert seen[0]["training"] == {"epochs": 9} and seen[0]["model"] == {"name": "a"}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a: [1", "mine.yaml: is not valid YAML: line 1, column 6: "),
        ("a: b: c", "mine.yaml: is not valid YAML: line 1, column 5: mapping values are not allowed here"),
        ("task: auto\ntask: auto\n", "line 2, column 1: key 'task' is given twice"),
        ("a: \x00", "character 4 may not stand in it"),
        ("a: 2024-02-31", "day"),
        ("[" * 2000, "nested too deeply"),
        ("just words", "mine.yaml: must be a mapping of names to values (given: 'just words')"),
        ("!!int x: 1", "is not valid YAML"),
    ],
)
def test_what_cannot_be_read_is_the_only_problem(text: str, expected: str) -> None:
    with pytest.raises(RequestError) as caught:
        load(DistillConfig, text)
    (problem,) = caught.value.problems
    assert expected in str(problem) and "<unicode string>" not in str(problem)
    assert caught.value.hint is None


def test_the_general_hint_is_given_where_a_key_is_unknown_and_nowhere_else() -> None:
    for option, helps in (("epochz=1", True), ("training.epochs=0", False)):
        with pytest.raises(RequestError) as caught:
            load(TrainConfig, None, option)
        assert (caught.value.hint is not None) == helps


@pytest.mark.parametrize(
    ("kind", "text", "words"),
    [
        (
            TrainConfig,
            "student: {name: a}\nteachers: []\nmethod: kd\n",
            "'visionkd distill' (it has student and teachers)",
        ),
        (TrainConfig, "method: kd\n", "'visionkd distill' (it has method)"),
        (DistillConfig, "model: {name: a}\nlr: 3\n", "'visionkd train' (it has model)"),
    ],
)
def test_the_recipe_of_another_command_is_refused_in_one_line(kind: type[RunConfig], text: str, words: str) -> None:
    with pytest.raises(RequestError) as caught:
        load(kind, text, again="--config mine.yaml")
    (problem,) = caught.value.problems
    assert str(problem) == f"mine.yaml: is a recipe for {words}"
    command = words.split("'")[1]
    assert caught.value.hint == f"Run: {command} --config mine.yaml"


def test_an_alias_is_a_copy() -> None:
    text = "student: &n {name: a}\nteachers: [*n]\n"
    config = load(DistillConfig, text, overrides={"student.name": "c"})
    assert (config.student.name, config.teachers[0].name) == ("c", "a")


@pytest.mark.parametrize(
    ("option", "expected"),
    [
        ("model.args.a=2024-01-01", "model.args.a: must be text, a number, a list or a mapping, not a date"),
        ("model.args.a={1: 2}", "model.args.a: the name 1 is read as a int, and names are text. Put it in quotes."),
        ("model.args.a=!!set {x}", "not a set"),
        ("model.args.a=.inf", "model.args.a: must be a finite number (given: inf)"),
        ("model.args.a=0x" + "f" * 5000, "at most 64 bits (given: a very large int)"),
        ("model.args.a=\udc80", "valid text"),
        ("model.args.a=&x [*x]", f"more than {MAX_DEPTH} levels"),
        ("model.args." + "a." * 5000 + "a=1", f"more than {MAX_DEPTH} levels"),
        ("model.name.x=1", "model.name.x: 'model.name' has no part 'x'"),
    ],
)
def test_values_that_could_not_be_written_down_again_are_refused(option: str, expected: str) -> None:
    assert expected in problems(TrainConfig, None, option)[0]


def test_a_list_is_indexed_and_its_length_named() -> None:
    assert load(DistillConfig, None, "teachers.0.img_size=64").teachers[0].img_size == 64
    (found,) = problems(DistillConfig, None, "teachers.1.name=c")
    assert found == "teachers.1.name: 'teachers' has no part '1': it has 1, counted from 0"


def test_a_value_that_grows_by_aliases_is_refused() -> None:
    lines = ["a0: &a0 [1, 1, 1, 1, 1, 1, 1, 1, 1, 1]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 9)]
    assert f"{MAX_VALUES:,}" in problems(TrainConfig, "\n".join(lines))[0]
    (found,) = problems(TrainConfig, "- " + "\n- ".join(line.partition(": ")[2] for line in lines))
    assert "must be a mapping" in found and len(found) < 250, "what is shown of it stays short"


def test_options_of_a_method() -> None:
    found = problems(DistillConfig, None, "options.temprature=2", "options.hard=maybe")
    assert found[0] == "options.temprature: unknown option of this method. Did you mean 'temperature'?"
    assert found[1].startswith("options.hard: ") and "(given: 'maybe')" in found[1]
    (found,) = options_problems(Options, {"temperature": -1})
    assert found.message.startswith("temperature must be above 0")
    assert build_options(Options, {"temperature": "2"}) == Options(2.0)


def test_a_dump_is_what_a_reader_expects() -> None:
    text = dump_config(load(TrainConfig, None, "model.args.title=Größe", "optimizer.lr=1e-5"))
    assert "Größe" in text and yaml.safe_load(text)["optimizer"]["lr"] == 1e-5
    assert list(yaml.safe_load(text))[0] == "task"


def test_plain_copies() -> None:
    values = {"a": [1, {"b": (2, 3)}], 4: 5}
    copied, found = plain(values)
    assert copied == {"a": [1, {"b": [2, 3]}]} and copied["a"] is not values["a"]
    assert [problem.key for problem in found] == ["4"]


# Anything at all ------------------------------------------------------------------------------------------------------

KEYS = sorted(
    {*RunConfig.model_fields, *DistillConfig.model_fields, "model", "name", "args", "lr", "epochs", "0", "path"}
)
SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(max_size=8),
    st.sampled_from(["", "auto", "32", "kd", "\ud800", "\x85", "\ufeff", "1e5", "yes", "null", 10**30]),
    st.dates(),
    st.binary(max_size=3),
)
NAMES = st.one_of(st.sampled_from(KEYS), st.text(max_size=5), st.integers(0, 3), st.none(), st.booleans())
TREES = st.recursive(
    SCALARS,
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(NAMES, inner, max_size=3)),
    max_leaves=8,
)
OPTION = st.one_of(
    st.text(max_size=20),
    st.builds(
        "{}={}".format,
        st.lists(st.one_of(st.sampled_from(KEYS), st.text(max_size=3)), min_size=1, max_size=4).map(".".join),
        st.one_of(
            st.text(max_size=10), st.sampled_from(["[1, {a: b}]", "&x [*x]", "0x" + "f" * 5000, "1", ".nan", "\ud800"])
        ),
    ),
)
fuzz = settings(deadline=None, max_examples=100, suppress_health_check=list(HealthCheck))


def answer(kind: type[RunConfig], text: str | None, overrides: Any = None, options: Any = ()) -> None:
    """Load, and check that the answer is a list of problems with keys or a configuration that can be repeated."""
    try:
        config = load_config(
            kind, text=text, overrides=overrides, options=options, method_options=method_options, spelled=SPELLED
        )
    except RequestError as error:
        assert error.problems
        for problem in error.problems:
            assert problem.key and problem.message, repr(problem)
        return
    assert load_config(kind, text=dump_config(config), method_options=method_options) == config


@fuzz
@given(st.sampled_from(KINDS), st.text())
@example(TrainConfig, "int: 1")
@example(TrainConfig, "? [a, b]\n: 1")
@example(TrainConfig, "!!map [a]")
@example(TrainConfig, "!!timestamp x")
@example(TrainConfig, "a: &a {b: *a}")
@example(TrainConfig, "!!python/object:os.system {}")
def test_any_text(kind: type[RunConfig], text: str) -> None:
    answer(kind, text)


@fuzz
@given(st.sampled_from(KINDS), st.dictionaries(NAMES, TREES, max_size=4))
def test_any_values_in_a_file(kind: type[RunConfig], values: Any) -> None:
    try:
        text = yaml.safe_dump({**MINIMAL.get(kind, {}), **values})
    except (yaml.YAMLError, UnicodeError):
        return
    answer(kind, text)


@fuzz
@given(
    st.sampled_from((DistillConfig, TrainConfig)),
    st.dictionaries(st.one_of(st.sampled_from(sorted(SPELLED)), st.text(max_size=6)), TREES, max_size=3),
)
@example(TrainConfig, {"model.args": {"a": datetime.date(2024, 1, 1)}})
@example(TrainConfig, {"": float("nan")})
def test_any_overrides(kind: type[RunConfig], overrides: Any) -> None:
    answer(kind, yaml.safe_dump(MINIMAL[kind]), overrides=overrides)


@fuzz
@given(st.sampled_from((DistillConfig, TrainConfig)), st.lists(OPTION, max_size=3))
@example(TrainConfig, ["model.args.a=2024-13-45"])
@example(TrainConfig, ["=1", ".=1", "..=.nan"])
def test_any_options(kind: type[RunConfig], options: list[str]) -> None:
    answer(kind, yaml.safe_dump(MINIMAL[kind]), options=options)


@fuzz
@given(st.dictionaries(st.text(max_size=4), TREES, max_size=3), st.dictionaries(st.text(max_size=4), TREES, max_size=3))
def test_free_form_values_that_are_accepted_come_back_equal(args: Any, options: Any) -> None:
    values = {
        "student": {"name": "a", "args": args},
        "teachers": [{"name": "b"}],
        "options": options,
        "method": "other",
    }
    answer(DistillConfig, None, overrides=values)


WORD = st.one_of(
    st.text(max_size=8), st.sampled_from(["=", "<<", "~", "null", "1e3", "0o7", "1:30", "on", "\x85", "a: b"])
)
NETWORK = st.fixed_dictionaries(
    {"name": WORD}, optional={"img_size": st.integers(1, 999), "precision": st.sampled_from([32, "16", "bf16"])}
)
OFTEN_RIGHT = st.fixed_dictionaries(
    {"student": NETWORK.map(lambda one: {"name": one["name"]}), "teachers": st.lists(NETWORK, min_size=1, max_size=2)},
    optional={
        "optimizer": st.fixed_dictionaries({}, optional={"lr": st.floats(1e-300, 1e300), "betas": st.just([0, 1])}),
        "training": st.fixed_dictionaries({}, optional={"epochs": st.integers(1, 10**12), "precision": st.just(16)}),
        "data": st.fixed_dictionaries({"path": WORD}, optional={"val_split": WORD, "max_unreadable": st.just(1)}),
        "export": st.just({"formats": ["onnx"]}),
        "augment": st.fixed_dictionaries({}, optional={"scale": st.just([0.1, 1]), "mixup_alpha": st.floats(0, 1e308)}),
    },
)


@fuzz
@given(OFTEN_RIGHT)
def test_what_a_recipe_may_hold_is_accepted_and_comes_back_equal(values: Any) -> None:
    config = load_config(DistillConfig, overrides=values)
    assert [teacher.name for teacher in config.teachers] == [one["name"] for one in values["teachers"]]
    again = load_config(DistillConfig, text=dump_config(config))
    assert again == config and dump_config(again) == dump_config(config)
