import datetime

from google.protobuf import duration_pb2 as _duration_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class CollectRequest(_message.Message):
    __slots__ = ("dry_run",)
    DRY_RUN_FIELD_NUMBER: _ClassVar[int]
    dry_run: bool
    def __init__(self, dry_run: _Optional[bool] = ...) -> None: ...

class CollectResponse(_message.Message):
    __slots__ = ("things", "took")
    THINGS_FIELD_NUMBER: _ClassVar[int]
    TOOK_FIELD_NUMBER: _ClassVar[int]
    things: _containers.RepeatedCompositeFieldContainer[Thing]
    took: _duration_pb2.Duration
    def __init__(self, things: _Optional[_Iterable[_Union[Thing, _Mapping[str, object]]]] = ..., took: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping[str, object]]] = ...) -> None: ...

class Thing(_message.Message):
    __slots__ = ("namespace", "kind", "key", "size")
    NAMESPACE_FIELD_NUMBER: _ClassVar[int]
    KIND_FIELD_NUMBER: _ClassVar[int]
    KEY_FIELD_NUMBER: _ClassVar[int]
    SIZE_FIELD_NUMBER: _ClassVar[int]
    namespace: str
    kind: str
    key: str
    size: int
    def __init__(self, namespace: _Optional[str] = ..., kind: _Optional[str] = ..., key: _Optional[str] = ..., size: _Optional[int] = ...) -> None: ...

class ExplainRequest(_message.Message):
    __slots__ = ("ref",)
    REF_FIELD_NUMBER: _ClassVar[int]
    ref: str
    def __init__(self, ref: _Optional[str] = ...) -> None: ...

class ExplainResponse(_message.Message):
    __slots__ = ("explanations",)
    EXPLANATIONS_FIELD_NUMBER: _ClassVar[int]
    explanations: _containers.RepeatedCompositeFieldContainer[Explanation]
    def __init__(self, explanations: _Optional[_Iterable[_Union[Explanation, _Mapping[str, object]]]] = ...) -> None: ...

class Explanation(_message.Message):
    __slots__ = ("thing", "chains", "more")
    THING_FIELD_NUMBER: _ClassVar[int]
    CHAINS_FIELD_NUMBER: _ClassVar[int]
    MORE_FIELD_NUMBER: _ClassVar[int]
    thing: Thing
    chains: _containers.RepeatedCompositeFieldContainer[Chain]
    more: int
    def __init__(self, thing: _Optional[_Union[Thing, _Mapping[str, object]]] = ..., chains: _Optional[_Iterable[_Union[Chain, _Mapping[str, object]]]] = ..., more: _Optional[int] = ...) -> None: ...

class Chain(_message.Message):
    __slots__ = ("links",)
    LINKS_FIELD_NUMBER: _ClassVar[int]
    links: _containers.RepeatedCompositeFieldContainer[Link]
    def __init__(self, links: _Optional[_Iterable[_Union[Link, _Mapping[str, object]]]] = ...) -> None: ...

class Link(_message.Message):
    __slots__ = ("thing", "how")
    THING_FIELD_NUMBER: _ClassVar[int]
    HOW_FIELD_NUMBER: _ClassVar[int]
    thing: Thing
    how: str
    def __init__(self, thing: _Optional[_Union[Thing, _Mapping[str, object]]] = ..., how: _Optional[str] = ...) -> None: ...
