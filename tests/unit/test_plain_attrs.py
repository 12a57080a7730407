"""Classes made by the stand-in for attrs: the same as those that attrs makes."""

# A type checker knows the methods that attrs adds, not those of a stand-in that is passed around.
# mypy: disable-error-code="call-arg, operator, attr-defined, call-overload"

from __future__ import annotations

import copy
import json
import pickle
import subprocess
import sys
import textwrap
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar

import attr
import attrs
import pytest

from qcowfuse.cli.plain_attrs import attr_module, attrs_module

REPOSITORY = Path(__file__).parents[2]
DESCRIBED = """
    import inspect, json, sys
    from qcowfuse.cli.plain_attrs import attr_module, attrs_module
    if sys.argv[1] == "plain":
        sys.modules.update(attrs=attrs_module(), attr=attr_module())
    import trio, outcome

    def described(cls):
        methods = ("__eq__", "__hash__", "__lt__", "__repr__", "__setattr__", "__delattr__")
        init = vars(cls).get("__init__")
        if init is not None and init.__name__ == "first_init":
            try:
                init(cls.__new__(cls), *range(99))
            except TypeError:
                pass  # it is compiled now
            init = cls.__init__
        parameters = inspect.signature(init).parameters.values() if inspect.isfunction(init) else ()
        return {
            "bases": [str(base) for base in cls.__mro__[1:]],
            "slots": sorted(cls.__slots__) if "__slots__" in vars(cls) else None,
            "match": list(getattr(cls, "__match_args__", ())),
            "methods": [vars(cls).get(name) is None if name in vars(cls) else "" for name in methods],
            "parameters": [[one.name, str(one.kind), one.default is one.empty] for one in parameters],
            "left": sorted(name for name, value in vars(cls).items() if isinstance(value, (int, float, str))
                           and not name.startswith("__")),
            "weak": hasattr(cls, "__weakref__"),
        }

    found = {}
    for name, module in list(sys.modules.items()):
        if name.split(".")[0] in ("trio", "outcome"):
            for key, cls in vars(module).items():
                own = isinstance(cls, type) and cls.__module__.split(".")[0] in ("trio", "outcome")
                if own and cls.__init__ is not object.__init__ and not issubclass(cls, ModuleNotFoundError):
                    found[f"{name}.{key}"] = described(cls)
    print(json.dumps(found))
"""


def described(kind: str) -> Any:
    command = [sys.executable, "-c", textwrap.dedent(DESCRIBED), kind]
    return json.loads(subprocess.run(command, cwd=REPOSITORY, capture_output=True, check=True).stdout)


def test_the_classes_of_trio_are_what_attrs_makes_of_them() -> None:
    """Slots, parameters, defaults, methods and bases of every class."""
    plain, real = described("plain"), described("real")
    assert len(real) > 100
    for name, of_attrs in real.items():
        assert plain[name] == of_attrs, name
    assert plain.keys() == real.keys()


@pytest.fixture(params=["attrs", "plain"])
def attrs_(request: pytest.FixtureRequest) -> ModuleType:
    return attrs if request.param == "attrs" else attrs_module()


@pytest.fixture(params=["attr", "plain"])
def attr_(request: pytest.FixtureRequest) -> ModuleType:
    return attr if request.param == "attr" else attr_module()


def test_a_class_with_fields(attrs_: Any) -> None:
    """Parameters, defaults, factories, aliases and text; equal when the fields are; unhashable, as it may change."""

    @attrs_.define
    class Point:
        x: int
        _y: int = attrs_.field(default=2, alias="height")
        tags: list[str] = attrs_.Factory(list)
        hidden: int = attrs_.field(default=7, init=False, repr=False)
        code: int = attrs_.field(kw_only=True, default=255, repr=hex)
        total: ClassVar[int] = 5

        def doubled(self) -> Any:
            return __class__(self.x * 2)  # type: ignore[name-defined]

    point = Point(1, height=3, code=16)
    assert (point.x, point._y, point.tags, point.hidden, point.code, Point.total) == (1, 3, [], 7, 16, 5)
    assert Point(1).tags is not Point(1).tags
    assert repr(point).endswith("Point(x=1, _y=3, tags=[], code=0x10)")
    assert point == Point(1, 3, code=16)
    assert point != Point(1, 3, code=17)
    other: Any = 5
    assert point != other
    assert point.doubled() == Point(2)
    assert copy.copy(point) == point
    with pytest.raises(TypeError, match="unhashable"):
        hash(point)
    with pytest.raises(AttributeError):
        point.z = 4
    with pytest.raises(TypeError):
        Point(1, 3, [], 16)
    with pytest.raises(TypeError, match="missing 1 required"):
        Point()
    assert Point.__match_args__[0] == "x"


def test_a_recursive_object_has_a_text(attrs_: Any) -> None:
    """It ends where the object comes up again."""

    @attrs_.define(eq=False)
    class Node:
        next: Any = None

    node = Node()
    node.next = node
    assert repr(node).endswith("Node(next=...)")


def test_a_frozen_class(attrs_: Any) -> None:
    """It can be hashed and copied, and not changed; nor can what is derived from it."""

    @attrs_.frozen
    class Base:
        a: int

    @attrs_.define
    class Derived(Base):
        b: int = 2

    derived = Derived(1)
    assert (derived.a, derived.b) == (1, 2)
    assert hash(Base(1)) == hash(Base(1))
    assert len({Base(1), Base(1), Base(2)}) == 2
    assert copy.copy(derived) == derived
    for made in (Base(1), derived):
        with pytest.raises(AttributeError):
            made.a = 5
        with pytest.raises(AttributeError):
            del made.a


@attrs_module().frozen
class Pickled:
    """At the module's level, where pickle finds it."""

    a: int


def test_a_frozen_object_is_pickled() -> None:
    """And made again."""
    assert pickle.loads(pickle.dumps(Pickled(5))) == Pickled(5)


def test_a_class_with_a_dictionary(attrs_: Any) -> None:
    """The class stays the same, without the defaults; other attributes can be set."""

    @attrs_.define(slots=False, eq=False)
    class Open:
        a: int = 1

        def __attrs_post_init__(self) -> None:
            self.b = self.a + 1

    made = Open()
    made.c = 3
    assert vars(made) == {"a": 1, "b": 2, "c": 3}
    assert not hasattr(Open, "a")
    assert made != Open()
    assert len({made, Open()}) == 2


def test_an_exception(attrs_: Any) -> None:
    """Its arguments are its fields."""

    @attrs_.define(eq=False, kw_only=True)
    class StoppedError(Exception):
        reason: str
        task: str | None = None

    stopped = StoppedError(reason="why")
    assert stopped.args == ("why", None)
    assert stopped.reason == "why"


def test_a_class_with_an_own_method(attrs_: Any) -> None:
    """It is kept."""

    @attrs_.define(eq=False)
    class Own:
        a: int

        def __repr__(self) -> str:
            return "own"

    assert repr(Own(1)) == "own"


def test_fields_without_annotations(attr_: Any) -> None:
    """The older interface: objects have an order, and what is checked is checked."""

    @attr_.s(repr=False, init=False, slots=True)
    class Base:
        _used: bool = attr_.ib(default=False, eq=False, init=False)

    @attr_.s(frozen=True, repr=False, slots=True)
    class Value(Base):
        value = attr_.ib(validator=attr_.validators.instance_of(int))

        def use(self) -> None:
            object.__setattr__(self, "_used", True)

    used = Value(1)
    used.use()
    assert used == Value(1)
    assert Value(1) < Value(2) >= Value(2)
    assert hash(used) == hash(Value(1))
    assert used._used
    assert not Value(1)._used
    with pytest.raises(TypeError, match="'value' must be"):
        Value("1")


@pytest.mark.parametrize(
    "declared",
    [
        pytest.param(lambda plain: plain.field(converter=int), id="a converter"),
        pytest.param(lambda plain: plain.Factory(list, takes_self=True), id="a factory with the object"),
        pytest.param(lambda plain: plain.define(order=True), id="an order"),
        pytest.param(lambda plain: plain.evolve, id="another function"),
        pytest.param(lambda plain: plain.frozen(type("Failure", (Exception,), {})), id="a frozen exception"),
        pytest.param(
            lambda plain: plain.define(type("Own", (), {"__eq__": lambda a, b: True})), id="an equality of its own"
        ),
    ],
)
def test_what_is_not_done_is_refused(declared: Any) -> None:
    """When the class is declared."""
    with pytest.raises((TypeError, AttributeError, NotImplementedError)):
        declared(attrs_module())
