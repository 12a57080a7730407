"""Stand-ins for ``attrs`` and ``attr``, as far as trio and outcome need them to declare their classes.

To import attrs, and to have it write the methods of trio's fifty classes, is a fifth of the time that a start takes.
Here only ``__init__`` is compiled, since the event loop calls it all the time, and not before the first object of the
class is made.

1. What is missing here is an error when the class is declared (an attribute or a keyword argument that there is not):
   :mod:`.trimmed_trio` then imports attrs itself. What is here does what attrs does (a test compares every class of
   trio).
2. Nothing can ask for the fields of a class afterwards.
"""

from __future__ import annotations

import operator
import reprlib
from collections.abc import Callable, Iterator
from types import CellType, FunctionType, ModuleType
from typing import Any, NamedTuple, TypeVar, overload

T = TypeVar("T")
_MISSING: Any = type("NOTHING", (), {"__repr__": lambda self: "NOTHING", "__bool__": lambda self: False})()
_OWN_FIELDS = "__qcowfuse_fields__"


class Factory(NamedTuple):
    """Makes the default of a field, each time anew."""

    factory: Callable[[], Any]


class _Field(NamedTuple):
    default: Any = _MISSING
    init: bool = True
    repr: bool | Callable[[Any], str] = True
    eq: bool = True
    kw_only: bool = False
    alias: str | None = None
    validator: Callable[[str, Any], None] | None = None
    name: str = ""

    @property
    def parameter(self) -> str:
        return self.alias or self.name.lstrip("_")


def field(
    *,
    default: Any = _MISSING,
    factory: Callable[[], Any] | None = None,
    init: bool = True,
    repr: bool | Callable[[Any], str] = True,
    eq: bool = True,
    kw_only: bool = False,
    alias: str | None = None,
) -> Any:
    """``attrs.field``."""
    return _Field(default if factory is None else Factory(factory), init, repr, eq, kw_only, alias)


def _attrib(
    *,
    default: Any = _MISSING,
    init: bool = True,
    eq: bool = True,
    validator: Callable[[str, Any], None] | None = None,
) -> Any:
    """``attr.ib``."""
    return _Field(default, init, eq=eq, validator=validator)


def _instance_of(expected: type) -> Callable[[str, Any], None]:
    """``attr.validators.instance_of``."""

    def check(name: str, value: Any) -> None:
        if not isinstance(value, expected):
            raise TypeError(f"{name!r} must be {expected!r} (got {value!r} that is a {type(value)!r}).")

    return check


class FrozenInstanceError(AttributeError):
    """An attribute of an object that stays as it was made was set."""


@overload
def define(cls: type[T]) -> type[T]: ...
@overload
def define(
    cls: None = None, *, eq: bool = ..., repr: bool = ..., slots: bool = ..., kw_only: bool = ..., frozen: bool = ...
) -> Callable[[type[T]], type[T]]: ...
def define(
    cls: type[T] | None = None,
    *,
    eq: bool = True,
    repr: bool = True,
    slots: bool = True,
    kw_only: bool = False,
    frozen: bool = False,
) -> Any:
    """``attrs.define``."""

    def made(cls: type[T]) -> type[T]:
        fields = _annotated_fields(cls, kw_only)
        # attrs checks what is set later, too.
        if not frozen and any(one.validator for one in fields):
            raise NotImplementedError("a field with a validator, of an object that changes")
        return _made(cls, fields, eq=eq, order=False, repr=repr, slots=slots, frozen=frozen, keeps_own=True)

    return made if cls is None else made(cls)


def frozen(cls: type[T] | None = None, *, eq: bool = True, slots: bool = True) -> Any:
    """``attrs.frozen``."""
    made: Callable[[type[T]], type[T]] = define(eq=eq, slots=slots, frozen=True)
    return made if cls is None else made(cls)


def _classic(*, repr: bool, slots: bool, init: bool = True, frozen: bool = False) -> Callable[[type[T]], type[T]]:
    """``attr.s``: the fields are those made with ``attr.ib``, and objects have an order."""

    def made(cls: type[T]) -> type[T]:
        fields = [one._replace(name=name) for name, one in vars(cls).items() if isinstance(one, _Field)]
        return _made(
            cls, fields, eq=True, order=True, repr=repr, slots=slots, frozen=frozen, keeps_own=False, init=init
        )

    return made


def attrs_module() -> ModuleType:
    """The stand-in for ``attrs``."""
    module = ModuleType("attrs", __doc__)
    vars(module).update(define=define, frozen=frozen, field=field, Factory=Factory)
    return module


def attr_module() -> ModuleType:
    """The stand-in for ``attr``."""
    module = ModuleType("attr", __doc__)
    validators = ModuleType("attr.validators")
    vars(validators).update(instance_of=_instance_of)
    vars(module).update(s=_classic, ib=_attrib, validators=validators)
    return module


def _annotated_fields(cls: type, kw_only: bool) -> list[_Field]:
    fields = []
    for name, annotation in cls.__annotations__.items():
        if str(annotation).strip("'\"").startswith(("ClassVar", "typing.ClassVar", "_t.ClassVar", "t.ClassVar")):
            continue
        value = vars(cls).get(name, _MISSING)
        one = value if isinstance(value, _Field) else _Field(value)
        fields.append(one._replace(name=name, kw_only=one.kw_only or kw_only))
    if any(isinstance(value, _Field) and name not in cls.__annotations__ for name, value in vars(cls).items()):
        raise NotImplementedError("fields with and without annotations")
    return fields


def _made(
    cls: type[T],
    own: list[_Field],
    *,
    eq: bool,
    order: bool,
    repr: bool,
    slots: bool,
    frozen: bool,
    keeps_own: bool,
    init: bool = True,
) -> type[T]:
    is_exception = issubclass(cls, BaseException)
    if hasattr(cls, "__attrs_pre_init__") or (is_exception and (frozen or eq or not keeps_own)):
        raise NotImplementedError(cls.__qualname__)
    names = {one.name for one in own}
    inherited = [one for base in reversed(cls.__mro__[1:]) for one in vars(base).get(_OWN_FIELDS, ())]
    fields = [one for one in inherited if one.name not in names] + own
    frozen = frozen or any(vars(base).get("__setattr__") is _refuse_to_set for base in cls.__mro__)
    added = _methods(fields, eq=eq, order=order, repr=repr, frozen=frozen)
    if init:
        added["__init__"] = _init_when_needed(fields, frozen, is_exception, hasattr(cls, "__attrs_post_init__"))
    if keeps_own:
        if not vars(cls).keys().isdisjoint(added.keys() - {"__init__", "__repr__"}):
            raise NotImplementedError(f"{cls.__qualname__} with an equality of its own")
        added = {name: value for name, value in added.items() if name not in vars(cls)}
    added["__match_args__"] = tuple(one.name for one in fields if one.init and not one.kw_only)
    added[_OWN_FIELDS] = tuple(own)
    if slots:
        return _with_slots(cls, own, added, frozen)
    for name in names & vars(cls).keys():
        delattr(cls, name)  # a default, which __init__ knows
    for name, value in added.items():
        setattr(cls, name, value)
    return cls


def _with_slots(cls: type[T], own: list[_Field], added: dict[str, Any], frozen: bool) -> type[T]:
    """A class like ``cls`` whose objects have no room but for the fields."""
    left_out = {"__dict__", "__weakref__", *(one.name for one in own)}
    body = {name: value for name, value in vars(cls).items() if name not in left_out} | added
    taken = {name for base in cls.__mro__[1:] for name in vars(base).get("__slots__", ())}
    slots = [one.name for one in own if one.name not in taken]
    if not any("__weakref__" in vars(base) for base in cls.__mro__[1:]):
        slots.append("__weakref__")
    body["__slots__"] = tuple(slots)
    body["__qualname__"] = cls.__qualname__
    if frozen:
        body |= {"__getstate__": _get_state, "__setstate__": _set_state}
    metaclass: Any = type(cls)
    made: type[T] = metaclass(cls.__name__, cls.__bases__, body)
    for cell in _class_cells(cls):
        if cell.cell_contents is cls:
            cell.cell_contents = made
    return made


def _class_cells(cls: type) -> Iterator[CellType]:
    """What ``super()`` and ``__class__`` in methods refer to."""
    for value in vars(cls).values():
        function = value.fget if isinstance(value, property) else getattr(value, "__func__", value)
        if isinstance(function, FunctionType):
            yield from function.__closure__ or ()


def _init_when_needed(
    fields: list[_Field], frozen: bool, is_exception: bool, has_post_init: bool
) -> Callable[..., None]:
    """An ``__init__`` that puts the compiled one in its place."""

    def first_init(self: Any, *args: Any, **named: Any) -> None:
        compiled = _compiled_init(fields, frozen, is_exception, has_post_init)
        for base in type(self).__mro__:
            if vars(base).get("__init__") is first_init:
                base.__init__ = compiled  # type: ignore[misc]
        compiled(self, *args, **named)

    return first_init


def _compiled_init(
    fields: list[_Field], frozen: bool, is_exception: bool, has_post_init: bool
) -> Callable[..., None]:
    known: dict[str, Any] = {"_MISSING": _MISSING, "_set_attribute": object.__setattr__}
    by_position: list[str] = ["self"]
    by_name: list[str] = []
    lines: list[str] = []
    for number, one in enumerate(fields):
        factory = one.default.factory if isinstance(one.default, Factory) else None
        known |= {f"_default_{number}": one.default, f"_factory_{number}": factory, f"_check_{number}": one.validator}
        default = f"_factory_{number}()" if factory else f"_default_{number}"
        if one.init:
            value = one.parameter
            shown = f"{value}=_MISSING" if factory else f"{value}={default}" if one.default is not _MISSING else value
            (by_name if one.kw_only else by_position).append(shown)
            if factory:
                value = f"{default} if {value} is _MISSING else {value}"
        elif one.default is not _MISSING:
            value = default
        else:
            continue  # somebody else sets it
        lines.append(f"_set_attribute(self, {one.name!r}, {value})" if frozen else f"self.{one.name} = {value}")
    lines += [f"_check_{number}({one.name!r}, self.{one.name})" for number, one in enumerate(fields) if one.validator]
    if has_post_init:
        lines.append("self.__attrs_post_init__()")
    if is_exception:
        given = ", ".join(f"self.{one.name}" for one in fields if one.init)
        lines.append(f"BaseException.__init__(self, {given})")
    parameters = ", ".join([*by_position, *(["*", *by_name] if by_name else [])])
    # Only names of fields become code. They stand in the source of the library.
    exec(f"def __init__({parameters}):\n    " + "\n    ".join(lines or ["pass"]), known)
    return known["__init__"]  # type: ignore[no-any-return]


def _methods(fields: list[_Field], *, eq: bool, order: bool, repr: bool, frozen: bool) -> dict[str, Any]:
    methods: dict[str, Any] = {}
    compared = tuple(one.name for one in fields if one.eq)

    def values(self: Any) -> tuple[Any, ...]:
        return tuple(getattr(self, name) for name in compared)

    def comparison(operate: Callable[[Any, Any], bool]) -> Callable[[Any, Any], Any]:
        def compare(self: Any, other: Any) -> Any:
            return operate(values(self), values(other)) if other.__class__ is self.__class__ else NotImplemented

        return compare

    if repr:
        methods["__repr__"] = _repr_of(fields)
    if eq:
        methods["__eq__"] = comparison(operator.eq)
        methods["__hash__"] = (lambda self: hash(values(self))) if frozen else None
    if eq and order:
        methods |= {f"__{name}__": comparison(getattr(operator, name)) for name in ("lt", "le", "gt", "ge")}
    if frozen:
        methods |= {"__setattr__": _refuse_to_set, "__delattr__": _refuse_to_delete}
    return methods


def _repr_of(fields: list[_Field]) -> Callable[[Any], str]:
    shown = [(one.name, one.repr if callable(one.repr) else repr) for one in fields if one.repr]

    @reprlib.recursive_repr()
    def text_of(self: Any) -> str:
        inner = ", ".join(f"{name}={text(getattr(self, name, _MISSING))}" for name, text in shown)
        return f"{type(self).__qualname__.rsplit('>.', 1)[-1]}({inner})"

    return text_of


def _refuse_to_set(self: object, name: str, value: object) -> None:
    raise FrozenInstanceError(f"{name} of {type(self).__qualname__} can't be set")


def _refuse_to_delete(self: object, name: str) -> None:
    raise FrozenInstanceError(f"{name} of {type(self).__qualname__} can't be deleted")


def _get_state(self: Any) -> dict[str, Any]:
    names = [one.name for base in type(self).__mro__ for one in vars(base).get(_OWN_FIELDS, ())]
    return {name: getattr(self, name) for name in names if hasattr(self, name)}


def _set_state(self: Any, state: dict[str, Any]) -> None:
    for name, value in state.items():
        object.__setattr__(self, name, value)
