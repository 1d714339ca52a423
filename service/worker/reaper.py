"""Finds running jobs whose worker shows no sign of life any more. Every process of the service has one."""

from __future__ import annotations

import time

from service.jobs.leases import Leases, Pulse
from service.worker.periodic import Periodic
from service.worker.silence import Silence, sign_interval


class Reaper(Periodic):
    """Takes a job from its worker when nothing of it has changed for the time of a lease."""

    def __init__(self, leases: Leases, lease_seconds: float) -> None:
        interval = sign_interval(lease_seconds)
        super().__init__(
            "reaper",
            interval,
            lambda: self.look(time.monotonic()),
            "cannot look for lost workers, going on",
        )
        self._leases = leases
        self._lease_seconds = lease_seconds
        self._silence = Silence[Pulse](interval)

    def look(self, moment: float) -> None:
        """Look at all running jobs; `moment` is the time of a monotonic clock, in seconds."""
        for pulse, seconds in self._silence.look(self._leases.pulses, moment).items():
            if seconds >= self._lease_seconds:
                self._leases.lose(pulse)
