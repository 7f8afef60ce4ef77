"""What decides: the vocabulary of requests and routes, the interfaces of policies, and the policies themselves."""

from .interfaces import (
    AdmissionPolicy,
    BatchPolicy,
    BatchView,
    ClusterPolicy,
    PolicyError,
    QueueOrder,
    RoutingPolicy,
    ScoringPolicy,
    SelectingPolicy,
)
from .prediction import Predictor
from .registry import register
from .views import ExecutorPool, ExecutorRow, FleetView
from .vocabulary import (
    Admit,
    BatchPlan,
    ChunkPlan,
    ContextPhaseParams,
    FinishReason,
    Hold,
    Reject,
    Request,
    RequestType,
    Role,
    Route,
    RouteMixed,
    SamplingConfig,
    Stage,
)

__all__ = [
    "AdmissionPolicy",
    "Admit",
    "BatchPlan",
    "BatchPolicy",
    "BatchView",
    "ChunkPlan",
    "ClusterPolicy",
    "ContextPhaseParams",
    "ExecutorPool",
    "ExecutorRow",
    "FinishReason",
    "FleetView",
    "Hold",
    "PolicyError",
    "Predictor",
    "QueueOrder",
    "Reject",
    "Request",
    "RequestType",
    "Role",
    "Route",
    "RouteMixed",
    "RoutingPolicy",
    "SamplingConfig",
    "ScoringPolicy",
    "SelectingPolicy",
    "Stage",
    "register",
]
