from wherry.proto import transfer_types_pb2 as _transfer_types_pb2
from wherry.proto import types_pb2 as _types_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class InspectRequest(_message.Message):
    __slots__ = ("registry", "platforms", "all_platforms")
    REGISTRY_FIELD_NUMBER: _ClassVar[int]
    PLATFORMS_FIELD_NUMBER: _ClassVar[int]
    ALL_PLATFORMS_FIELD_NUMBER: _ClassVar[int]
    registry: _transfer_types_pb2.OCIRegistry
    platforms: _containers.RepeatedCompositeFieldContainer[_types_pb2.Platform]
    all_platforms: bool
    def __init__(self, registry: _Optional[_Union[_transfer_types_pb2.OCIRegistry, _Mapping[str, object]]] = ..., platforms: _Optional[_Iterable[_Union[_types_pb2.Platform, _Mapping[str, object]]]] = ..., all_platforms: _Optional[bool] = ...) -> None: ...

class InspectResponse(_message.Message):
    __slots__ = ("documents",)
    DOCUMENTS_FIELD_NUMBER: _ClassVar[int]
    documents: _containers.RepeatedCompositeFieldContainer[Document]
    def __init__(self, documents: _Optional[_Iterable[_Union[Document, _Mapping[str, object]]]] = ...) -> None: ...

class Document(_message.Message):
    __slots__ = ("target", "platform", "data")
    TARGET_FIELD_NUMBER: _ClassVar[int]
    PLATFORM_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    target: _types_pb2.Descriptor
    platform: _types_pb2.Platform
    data: bytes
    def __init__(self, target: _Optional[_Union[_types_pb2.Descriptor, _Mapping[str, object]]] = ..., platform: _Optional[_Union[_types_pb2.Platform, _Mapping[str, object]]] = ..., data: _Optional[bytes] = ...) -> None: ...

class TagsRequest(_message.Message):
    __slots__ = ("registry",)
    REGISTRY_FIELD_NUMBER: _ClassVar[int]
    registry: _transfer_types_pb2.OCIRegistry
    def __init__(self, registry: _Optional[_Union[_transfer_types_pb2.OCIRegistry, _Mapping[str, object]]] = ...) -> None: ...

class TagsResponse(_message.Message):
    __slots__ = ("tags",)
    TAGS_FIELD_NUMBER: _ClassVar[int]
    tags: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, tags: _Optional[_Iterable[str]] = ...) -> None: ...

class CopySource(_message.Message):
    __slots__ = ("registry", "platforms")
    REGISTRY_FIELD_NUMBER: _ClassVar[int]
    PLATFORMS_FIELD_NUMBER: _ClassVar[int]
    registry: _transfer_types_pb2.OCIRegistry
    platforms: _containers.RepeatedCompositeFieldContainer[_types_pb2.Platform]
    def __init__(self, registry: _Optional[_Union[_transfer_types_pb2.OCIRegistry, _Mapping[str, object]]] = ..., platforms: _Optional[_Iterable[_Union[_types_pb2.Platform, _Mapping[str, object]]]] = ...) -> None: ...
