"""The parts of the running service, put together as the settings say: for the API and for workers alike."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

from prometheus_client import CollectorRegistry

from service.access.rates import Buckets, LocalBuckets, RedisBuckets
from service.database import Database
from service.health.readiness import Readiness
from service.health.redis_servers import RedisServers
from service.jobs.events import JobEvents
from service.jobs.leases import Leases
from service.jobs.service import JobService
from service.metrics.exposition import registry_of
from service.metrics.state import StateCollector
from service.resumable.service import ResumableUploads
from service.retention.maintenance import Maintenance
from service.retention.policy import Retention
from service.retention.service import RemovalService
from service.settings import Settings
from service.storage.directory import DataDirectory
from service.storage.local import LocalStore
from service.storage.store import Store, open_store
from service.tenants.service import TenantService
from service.uploads.intake import Intake
from service.uploads.service import UploadService
from service.webhooks.sender import WebhookSender
from service.webhooks.service import WebhookService
from service.worker.presence import Lookout
from service.worker.runner import Runner
from service.worker.supervisor import Supervisor


@dataclass(frozen=True)
class Services:
    """One of each, shared by all requests and workers of a process."""

    settings: Settings
    data: DataDirectory
    database: Database
    store: Store
    intake: Intake
    uploads: UploadService
    resumable: ResumableUploads
    jobs: JobService
    events: JobEvents
    leases: Leases
    runner: Runner
    webhooks: WebhookService
    removal: RemovalService
    supervisor: Supervisor
    sender: WebhookSender
    maintenance: Maintenance
    """Of a process that serves."""
    worker_maintenance: Maintenance
    """Of one that only runs jobs. When things go is a matter of the APIs, and so of their settings alone."""
    lookout: Lookout
    tenants: TenantService
    buckets: Buckets
    readiness: Readiness
    metrics: CollectorRegistry
    closing: threading.Event
    """Set when this process takes no more requests: answers without an end come to one."""

    @classmethod
    def of(cls, settings: Settings) -> Services:
        data = DataDirectory(settings.data_dir)
        database = Database(settings.database_url or data.database_url)
        store = open_store(settings, data)
        uploads = UploadService(database, store)
        retention = Retention()
        webhooks = WebhookService(database, settings)
        jobs = JobService(database, uploads, webhooks, retention)
        leases = Leases(database, settings.max_attempts, retention)
        runner = Runner(settings, data, store, uploads, jobs, leases)
        closing = threading.Event()
        dispatcher = None
        if settings.queue == "celery":
            from service.worker.messages import Dispatcher, celery_app

            dispatcher = Dispatcher(celery_app(settings), leases, jobs.queued)
        resumable = ResumableUploads(settings, data, database, uploads)
        supervisor = Supervisor(settings, jobs, leases, runner, dispatcher)
        lookout = Lookout(database, settings.lease_seconds)

        def count_workers() -> int | None:
            return int(supervisor.takes_jobs()) if database.is_sqlite else lookout.count()

        redis_servers = RedisServers(settings)
        removal = RemovalService(database, store, uploads, retention, settings)
        return cls(
            settings=settings,
            data=data,
            database=database,
            store=store,
            intake=Intake(settings),
            uploads=uploads,
            resumable=resumable,
            jobs=jobs,
            events=JobEvents(jobs, closing, settings.max_event_streams),
            leases=leases,
            runner=runner,
            webhooks=webhooks,
            removal=removal,
            supervisor=supervisor,
            readiness=Readiness(data, database, store, runner, supervisor, count_workers, redis_servers),
            metrics=registry_of(StateCollector(database, data, count_workers, redis_servers)),
            sender=WebhookSender(webhooks, settings.webhook_timeout_seconds),
            maintenance=Maintenance(
                {
                    "expire jobs": removal.expire_jobs,
                    "expire uploads": removal.expire_uploads,
                    "expire resumable uploads": resumable.remove_expired,
                    "remove results": removal.remove_results,
                    "remove contents": removal.remove_contents,
                    "forget deliveries": webhooks.forget_deleted_jobs,
                    "remove abandoned directories": data.remove_abandoned,
                }
            ),
            worker_maintenance=Maintenance(
                {
                    "read the policy of retention": removal.read_policy,
                    "remove abandoned directories": data.remove_abandoned,
                }
            ),
            lookout=lookout,
            tenants=TenantService(database),
            buckets=LocalBuckets() if settings.redis_url is None else RedisBuckets(str(settings.redis_url)),
            closing=closing,
        )

    @contextmanager
    def opened(self) -> Iterator[None]:
        """Directories and database are there and up to date within the block.

        Raises:
            BlockingIOError: the database is SQLite and another process uses the data directory.
        """
        # SQLite and what is beside it belong to one process; PostgreSQL is shared.
        with self.data.locked() if self.database.is_sqlite else nullcontext():
            self.data.create()
            if isinstance(self.store, LocalStore):
                self.store.adopt_version_0_1_0()
            self.database.migrate()
            self.removal.read_policy()
            if self.database.is_sqlite:
                # No other process can run anything: no need to wait for the end of a lease.
                self.leases.recover()
            try:
                yield
            finally:
                self.intake.close()
                self.database.close()
