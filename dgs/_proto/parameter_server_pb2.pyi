from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Chunk(_message.Message):
    __slots__ = ("data",)
    DATA_FIELD_NUMBER: _ClassVar[int]
    data: bytes
    def __init__(self, data: _Optional[bytes] = ...) -> None: ...

class TensorSpec(_message.Message):
    __slots__ = ("name", "shape", "buffer", "aliases")
    NAME_FIELD_NUMBER: _ClassVar[int]
    SHAPE_FIELD_NUMBER: _ClassVar[int]
    BUFFER_FIELD_NUMBER: _ClassVar[int]
    ALIASES_FIELD_NUMBER: _ClassVar[int]
    name: str
    shape: _containers.RepeatedScalarFieldContainer[int]
    buffer: bool
    aliases: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, name: _Optional[str] = ..., shape: _Optional[_Iterable[int]] = ..., buffer: bool = ..., aliases: _Optional[_Iterable[str]] = ...) -> None: ...

class Slab(_message.Message):
    __slots__ = ("tensor", "offset", "shape")
    TENSOR_FIELD_NUMBER: _ClassVar[int]
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    SHAPE_FIELD_NUMBER: _ClassVar[int]
    tensor: int
    offset: _containers.RepeatedScalarFieldContainer[int]
    shape: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, tensor: _Optional[int] = ..., offset: _Optional[_Iterable[int]] = ..., shape: _Optional[_Iterable[int]] = ...) -> None: ...

class View(_message.Message):
    __slots__ = ("slabs",)
    SLABS_FIELD_NUMBER: _ClassVar[int]
    slabs: _containers.RepeatedCompositeFieldContainer[Slab]
    def __init__(self, slabs: _Optional[_Iterable[_Union[Slab, _Mapping]]] = ...) -> None: ...

class JoinRequest(_message.Message):
    __slots__ = ("protocol", "worker", "incarnation", "member", "shard", "num_shards", "tensors", "views", "download_density", "values", "selection", "dense_below", "may_initialise", "take_over", "resume_incarnation", "resume_seq", "resume_in_flight", "restore")
    PROTOCOL_FIELD_NUMBER: _ClassVar[int]
    WORKER_FIELD_NUMBER: _ClassVar[int]
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    MEMBER_FIELD_NUMBER: _ClassVar[int]
    SHARD_FIELD_NUMBER: _ClassVar[int]
    NUM_SHARDS_FIELD_NUMBER: _ClassVar[int]
    TENSORS_FIELD_NUMBER: _ClassVar[int]
    VIEWS_FIELD_NUMBER: _ClassVar[int]
    DOWNLOAD_DENSITY_FIELD_NUMBER: _ClassVar[int]
    VALUES_FIELD_NUMBER: _ClassVar[int]
    SELECTION_FIELD_NUMBER: _ClassVar[int]
    DENSE_BELOW_FIELD_NUMBER: _ClassVar[int]
    MAY_INITIALISE_FIELD_NUMBER: _ClassVar[int]
    TAKE_OVER_FIELD_NUMBER: _ClassVar[int]
    RESUME_INCARNATION_FIELD_NUMBER: _ClassVar[int]
    RESUME_SEQ_FIELD_NUMBER: _ClassVar[int]
    RESUME_IN_FLIGHT_FIELD_NUMBER: _ClassVar[int]
    RESTORE_FIELD_NUMBER: _ClassVar[int]
    protocol: int
    worker: str
    incarnation: int
    member: int
    shard: int
    num_shards: int
    tensors: _containers.RepeatedCompositeFieldContainer[TensorSpec]
    views: _containers.RepeatedCompositeFieldContainer[View]
    download_density: float
    values: str
    selection: str
    dense_below: int
    may_initialise: bool
    take_over: bool
    resume_incarnation: int
    resume_seq: int
    resume_in_flight: bool
    restore: bool
    def __init__(self, protocol: _Optional[int] = ..., worker: _Optional[str] = ..., incarnation: _Optional[int] = ..., member: _Optional[int] = ..., shard: _Optional[int] = ..., num_shards: _Optional[int] = ..., tensors: _Optional[_Iterable[_Union[TensorSpec, _Mapping]]] = ..., views: _Optional[_Iterable[_Union[View, _Mapping]]] = ..., download_density: _Optional[float] = ..., values: _Optional[str] = ..., selection: _Optional[str] = ..., dense_below: _Optional[int] = ..., may_initialise: bool = ..., take_over: bool = ..., resume_incarnation: _Optional[int] = ..., resume_seq: _Optional[int] = ..., resume_in_flight: bool = ..., restore: bool = ...) -> None: ...

class JoinReply(_message.Message):
    __slots__ = ("outcome", "run", "worker_id", "version", "initialiser", "unchanged", "cursor", "earlier_exchanges")
    class Outcome(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
        __slots__ = ()
        OUTCOME_UNSPECIFIED: _ClassVar[JoinReply.Outcome]
        JOINED: _ClassVar[JoinReply.Outcome]
        RESUMED: _ClassVar[JoinReply.Outcome]
        GIVE_MODEL: _ClassVar[JoinReply.Outcome]
    OUTCOME_UNSPECIFIED: JoinReply.Outcome
    JOINED: JoinReply.Outcome
    RESUMED: JoinReply.Outcome
    GIVE_MODEL: JoinReply.Outcome
    OUTCOME_FIELD_NUMBER: _ClassVar[int]
    RUN_FIELD_NUMBER: _ClassVar[int]
    WORKER_ID_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    INITIALISER_FIELD_NUMBER: _ClassVar[int]
    UNCHANGED_FIELD_NUMBER: _ClassVar[int]
    CURSOR_FIELD_NUMBER: _ClassVar[int]
    EARLIER_EXCHANGES_FIELD_NUMBER: _ClassVar[int]
    outcome: JoinReply.Outcome
    run: int
    worker_id: int
    version: int
    initialiser: str
    unchanged: bool
    cursor: bytes
    earlier_exchanges: int
    def __init__(self, outcome: _Optional[_Union[JoinReply.Outcome, str]] = ..., run: _Optional[int] = ..., worker_id: _Optional[int] = ..., version: _Optional[int] = ..., initialiser: _Optional[str] = ..., unchanged: bool = ..., cursor: _Optional[bytes] = ..., earlier_exchanges: _Optional[int] = ...) -> None: ...

class PullRequest(_message.Message):
    __slots__ = ("run", "worker_id", "member", "incarnation")
    RUN_FIELD_NUMBER: _ClassVar[int]
    WORKER_ID_FIELD_NUMBER: _ClassVar[int]
    MEMBER_FIELD_NUMBER: _ClassVar[int]
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    run: int
    worker_id: int
    member: int
    incarnation: int
    def __init__(self, run: _Optional[int] = ..., worker_id: _Optional[int] = ..., member: _Optional[int] = ..., incarnation: _Optional[int] = ...) -> None: ...

class LeaveRequest(_message.Message):
    __slots__ = ("run", "worker_id", "member", "incarnation")
    RUN_FIELD_NUMBER: _ClassVar[int]
    WORKER_ID_FIELD_NUMBER: _ClassVar[int]
    MEMBER_FIELD_NUMBER: _ClassVar[int]
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    run: int
    worker_id: int
    member: int
    incarnation: int
    def __init__(self, run: _Optional[int] = ..., worker_id: _Optional[int] = ..., member: _Optional[int] = ..., incarnation: _Optional[int] = ...) -> None: ...

class LeaveReply(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class StatusRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class WorkerStatus(_message.Message):
    __slots__ = ("worker", "member", "incarnation", "exchanges", "staleness_p50", "staleness_p99", "bytes_up", "bytes_down", "behind")
    WORKER_FIELD_NUMBER: _ClassVar[int]
    MEMBER_FIELD_NUMBER: _ClassVar[int]
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    EXCHANGES_FIELD_NUMBER: _ClassVar[int]
    STALENESS_P50_FIELD_NUMBER: _ClassVar[int]
    STALENESS_P99_FIELD_NUMBER: _ClassVar[int]
    BYTES_UP_FIELD_NUMBER: _ClassVar[int]
    BYTES_DOWN_FIELD_NUMBER: _ClassVar[int]
    BEHIND_FIELD_NUMBER: _ClassVar[int]
    worker: str
    member: int
    incarnation: int
    exchanges: int
    staleness_p50: float
    staleness_p99: float
    bytes_up: int
    bytes_down: int
    behind: int
    def __init__(self, worker: _Optional[str] = ..., member: _Optional[int] = ..., incarnation: _Optional[int] = ..., exchanges: _Optional[int] = ..., staleness_p50: _Optional[float] = ..., staleness_p99: _Optional[float] = ..., bytes_up: _Optional[int] = ..., bytes_down: _Optional[int] = ..., behind: _Optional[int] = ...) -> None: ...

class StatusReply(_message.Message):
    __slots__ = ("run", "ready", "version", "shard", "num_shards", "range_start", "range_stop", "tensors", "workers", "refused", "initialiser", "staleness_p50", "staleness_p99", "bytes_up", "bytes_down", "evicted", "limits", "storage", "security")
    RUN_FIELD_NUMBER: _ClassVar[int]
    READY_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    SHARD_FIELD_NUMBER: _ClassVar[int]
    NUM_SHARDS_FIELD_NUMBER: _ClassVar[int]
    RANGE_START_FIELD_NUMBER: _ClassVar[int]
    RANGE_STOP_FIELD_NUMBER: _ClassVar[int]
    TENSORS_FIELD_NUMBER: _ClassVar[int]
    WORKERS_FIELD_NUMBER: _ClassVar[int]
    REFUSED_FIELD_NUMBER: _ClassVar[int]
    INITIALISER_FIELD_NUMBER: _ClassVar[int]
    STALENESS_P50_FIELD_NUMBER: _ClassVar[int]
    STALENESS_P99_FIELD_NUMBER: _ClassVar[int]
    BYTES_UP_FIELD_NUMBER: _ClassVar[int]
    BYTES_DOWN_FIELD_NUMBER: _ClassVar[int]
    EVICTED_FIELD_NUMBER: _ClassVar[int]
    LIMITS_FIELD_NUMBER: _ClassVar[int]
    STORAGE_FIELD_NUMBER: _ClassVar[int]
    SECURITY_FIELD_NUMBER: _ClassVar[int]
    run: int
    ready: bool
    version: int
    shard: int
    num_shards: int
    range_start: int
    range_stop: int
    tensors: _containers.RepeatedCompositeFieldContainer[TensorSpec]
    workers: _containers.RepeatedCompositeFieldContainer[WorkerStatus]
    refused: int
    initialiser: str
    staleness_p50: float
    staleness_p99: float
    bytes_up: int
    bytes_down: int
    evicted: int
    limits: Limits
    storage: Storage
    security: Security
    def __init__(self, run: _Optional[int] = ..., ready: bool = ..., version: _Optional[int] = ..., shard: _Optional[int] = ..., num_shards: _Optional[int] = ..., range_start: _Optional[int] = ..., range_stop: _Optional[int] = ..., tensors: _Optional[_Iterable[_Union[TensorSpec, _Mapping]]] = ..., workers: _Optional[_Iterable[_Union[WorkerStatus, _Mapping]]] = ..., refused: _Optional[int] = ..., initialiser: _Optional[str] = ..., staleness_p50: _Optional[float] = ..., staleness_p99: _Optional[float] = ..., bytes_up: _Optional[int] = ..., bytes_down: _Optional[int] = ..., evicted: _Optional[int] = ..., limits: _Optional[_Union[Limits, _Mapping]] = ..., storage: _Optional[_Union[Storage, _Mapping]] = ..., security: _Optional[_Union[Security, _Mapping]] = ...) -> None: ...

class Limits(_message.Message):
    __slots__ = ("max_workers", "record_bytes", "reply_bytes", "max_in_flight_bytes", "in_flight_bytes", "put_off", "lease_s", "max_reply_bytes")
    MAX_WORKERS_FIELD_NUMBER: _ClassVar[int]
    RECORD_BYTES_FIELD_NUMBER: _ClassVar[int]
    REPLY_BYTES_FIELD_NUMBER: _ClassVar[int]
    MAX_IN_FLIGHT_BYTES_FIELD_NUMBER: _ClassVar[int]
    IN_FLIGHT_BYTES_FIELD_NUMBER: _ClassVar[int]
    PUT_OFF_FIELD_NUMBER: _ClassVar[int]
    LEASE_S_FIELD_NUMBER: _ClassVar[int]
    MAX_REPLY_BYTES_FIELD_NUMBER: _ClassVar[int]
    max_workers: int
    record_bytes: int
    reply_bytes: int
    max_in_flight_bytes: int
    in_flight_bytes: int
    put_off: int
    lease_s: float
    max_reply_bytes: int
    def __init__(self, max_workers: _Optional[int] = ..., record_bytes: _Optional[int] = ..., reply_bytes: _Optional[int] = ..., max_in_flight_bytes: _Optional[int] = ..., in_flight_bytes: _Optional[int] = ..., put_off: _Optional[int] = ..., lease_s: _Optional[float] = ..., max_reply_bytes: _Optional[int] = ...) -> None: ...

class Storage(_message.Message):
    __slots__ = ("position", "durable", "snapshot_position", "snapshot_age_s", "log_bytes", "trouble")
    POSITION_FIELD_NUMBER: _ClassVar[int]
    DURABLE_FIELD_NUMBER: _ClassVar[int]
    SNAPSHOT_POSITION_FIELD_NUMBER: _ClassVar[int]
    SNAPSHOT_AGE_S_FIELD_NUMBER: _ClassVar[int]
    LOG_BYTES_FIELD_NUMBER: _ClassVar[int]
    TROUBLE_FIELD_NUMBER: _ClassVar[int]
    position: int
    durable: int
    snapshot_position: int
    snapshot_age_s: float
    log_bytes: int
    trouble: str
    def __init__(self, position: _Optional[int] = ..., durable: _Optional[int] = ..., snapshot_position: _Optional[int] = ..., snapshot_age_s: _Optional[float] = ..., log_bytes: _Optional[int] = ..., trouble: _Optional[str] = ...) -> None: ...

class Security(_message.Message):
    __slots__ = ("tls", "client_certificates", "tokens", "certificate_ends_s", "turned_away")
    TLS_FIELD_NUMBER: _ClassVar[int]
    CLIENT_CERTIFICATES_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    CERTIFICATE_ENDS_S_FIELD_NUMBER: _ClassVar[int]
    TURNED_AWAY_FIELD_NUMBER: _ClassVar[int]
    tls: bool
    client_certificates: bool
    tokens: bool
    certificate_ends_s: float
    turned_away: int
    def __init__(self, tls: bool = ..., client_certificates: bool = ..., tokens: bool = ..., certificate_ends_s: _Optional[float] = ..., turned_away: _Optional[int] = ...) -> None: ...
