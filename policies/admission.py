"""Admission policies: whether a request enters the cluster."""

from __future__ import annotations

from .interfaces import AdmissionPolicy
from .registry import register
from .views import FleetView
from .vocabulary import Admission, Admit, Request

_ADMIT = Admit()


@register("accept_all", kind="admission", source="every system's default")
class AcceptAll(AdmissionPolicy):
    """Admit everything."""

    def admit(self, request: Request, fleet: FleetView) -> Admission:
        return _ADMIT
