"""A job's process is taken over: what it reaches, what it uses, and what it leaves behind."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from fastapi.testclient import TestClient
from service_helpers import FAKE_WORKER, UNCONFINED_WORKER, is_running, submit, wait_for, wait_for_pid
from typer.testing import CliRunner

from service import cli
from service.app import create_app
from service.errors import ServiceErrorCode
from service.settings import Settings
from service.storage.directory import remove
from service.worker import isolation, landlock, process, seccomp
from service.worker.isolation import Isolation, IsolationUnavailableError, probe
from service.worker.limits import Limits
from service.worker.postmortem import cause_of_death
from service.worker.usage import excess

NEEDS_LANDLOCK = pytest.mark.skipif(landlock.version() < 1, reason="this kernel has no Landlock")
NEEDS_SECCOMP = pytest.mark.skipif(not seccomp.available(), reason="this kernel takes no system call filter")

SETUP = """
import ctypes, os, pathlib, resource, signal, socket, struct, threading
from ctypes import CDLL, c_long, get_errno
library = CDLL(None, use_errno=True)

def call(number, *arguments):
    if library.syscall(c_long(number), *arguments) < 0:
        raise OSError(get_errno(), "")

def exists(value):
    if not value:
        raise OSError(2, "")
"""

# Code with the names of what is there.
FILES = {
    "read another upload": "open({other!r}).read()",
    "read the database": "open({database!r}, 'rb').read()",
    "list the data directory": "os.listdir({data!r})",
    "read a file of the system": "open('/etc/passwd').read()",
    "read the service's environment": "open('/proc/{service}/environ').read()",
    "read the service's memory": "open('/proc/{service}/mem', 'rb')",
    "read another job's memory": "open('/proc/{neighbour}/mem', 'rb')",
    "leave by /proc": "open('/proc/{service}/root/etc/passwd')",
    "write its input": "open(model, 'a')",
    "remove its input": "os.unlink(model)",
    "truncate its input": "os.truncate(model, 0)",
    "write to shared memory": "open('/dev/shm/x', 'w')",
    "link to elsewhere": "os.symlink('/etc/passwd', files / 'link')",
    "make a pipe": "os.mkfifo(files / 'pipe')",
    "run a program": "os.execv('/bin/true', ['true'])",
}
CALLS = {
    "connect": "socket.create_connection(('127.0.0.1', {port}))",
    "send datagrams": "socket.socket(socket.AF_INET, socket.SOCK_DGRAM)",
    "use IPv6": "socket.socket(socket.AF_INET6)",
    "talk to the kernel's network": "socket.socket(socket.AF_NETLINK, socket.SOCK_RAW)",
    "use local sockets": "socket.socket(socket.AF_UNIX)",
    "use pairs of sockets": "socket.socketpair()",
    "start a process": "os.fork() or os._exit(0)",
    "kill the service": "os.kill({service}, 9)",
    "kill another job": "os.kill({neighbour}, 9)",
    "kill everything": "os.kill(-1, 9)",
    "change its input's mode": "os.chmod(model, 0)",
    "change the time of its input": "os.utime(model)",
    "limit the service": "resource.prlimit({service}, resource.RLIMIT_CPU, (1, 1))",
    "hide memory in files": "os.memfd_create('x')",
    "slow another job down": "os.setpriority(os.PRIO_PROCESS, {neighbour}, 19)",
}
RAW_CALLS = {  # x86-64, aarch64
    "trace": (101, 117, "16, {service}, 0, 0"),
    "read memory": (310, 270, "{service}, None, 0, None, 0, 0"),
    "new namespaces": (272, 97, "0x10000000"),
    "io_uring": (425, 425, "1, None"),
    "bpf": (321, 280, "0, None, 0"),
    "keys": (250, 219, "0, 0, 0"),
    "userfaultfd": (323, 282, "1"),
}
POSSIBLE = {
    "read its model": "open(model).read()",
    "read its calibration": "exists(open(calibration).read())",
    "write to its directory": "(files / 'kept.txt').write_text('kept')",
    "replace files": "(files / 'a').touch(); os.replace(files / 'a', files / 'b'); os.unlink(files / 'b')",
    "make directories": "os.mkdir(files.parent / 'd'); os.rename(files.parent / 'd', files.parent / 'e'); "
    "os.rmdir(files.parent / 'e')",
    "start threads": "t = threading.Thread(target=int); t.start(); t.join()",
    "know the CPU": "exists(open('/proc/cpuinfo').read()); exists(os.listdir('/sys/devices/system/cpu'))",
    "know itself": "exists(open('/proc/self/maps').read()); os.kill(os.getpid(), 0)",
    "throw away": "open('/dev/null', 'w').write('x'); exists(open('/dev/urandom', 'rb').read(1))",
}
REFUSED = ("EPERM", "EACCES")
PATIENCE = 180
"""Seconds; on a machine that does much else a job takes long to start."""


def upload(client: TestClient, kind: str, content: bytes) -> str:
    """Store a file; its id."""
    answer = client.post(f"/v1/{kind}", content=content)
    assert answer.status_code in (200, 201), answer.text
    identifier: str = answer.json()["id"]
    return identifier


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """What came of each attempt of a job, by name: `done`, or the name of the error number."""
    data = tmp_path_factory.mktemp("isolation") / "data"
    with contextlib.ExitStack() as stack:
        patch = stack.enter_context(pytest.MonkeyPatch.context())
        patch.setattr(process, "COMMAND", FAKE_WORKER)
        app = create_app(Settings(data_dir=data, log_level="warning", workers=2))
        client = stack.enter_context(TestClient(app, base_url="http://localhost"))
        listener = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        neighbour = submit(client, {"seconds": 600})
        other = b"of somebody else"
        upload(client, "datasets", other)
        calibration = upload(client, "datasets", b"calibration")
        stored = [path for path in (data / "blobs").rglob("*") if path.is_file()]
        names = {
            "other": str(next(path for path in stored if path.read_bytes() == other)),
            "database": str(data / "onnx-qat.db"),
            "data": str(data),
            "service": os.getpid(),
            "neighbour": wait_for_pid(client, neighbour),
            "port": listener.getsockname()[1],
        }
        column = 0 if os.uname().machine == "x86_64" else 1
        attempts = {
            **FILES,
            **CALLS,
            **{name: f"call({case[column]}, {case[2]})" for name, case in RAW_CALLS.items()},
            **POSSIBLE,
        }
        codes = {name: SETUP + code.format(**names) for name, code in attempts.items()}
        model = upload(client, "models", json.dumps({"do": "try", "codes": codes}).encode())
        job = client.post(
            "/v1/jobs", json={"kind": "prepare", "model": model, "calibration": calibration}
        ).json()["id"]
        ended = wait_for(client, job, seconds=PATIENCE)
        assert ended["state"] == "succeeded", ended["failure"]
        assert is_running(names["neighbour"])
        found = client.get(f"/v1/jobs/{job}/files/outcomes.json").json()
        client.post(f"/v1/jobs/{neighbour}/cancel")
        yield found


@NEEDS_LANDLOCK
@pytest.mark.parametrize("attempt", FILES)
def test_files_of_others_are_out_of_reach(outcomes: dict[str, str], attempt: str) -> None:
    assert outcomes[attempt] in REFUSED


@NEEDS_SECCOMP
@pytest.mark.parametrize("attempt", [*CALLS, *RAW_CALLS])
def test_network_and_processes_are_out_of_reach(outcomes: dict[str, str], attempt: str) -> None:
    assert outcomes[attempt] in REFUSED


@pytest.mark.parametrize("attempt", POSSIBLE)
def test_what_a_job_needs_is_possible(outcomes: dict[str, str], attempt: str) -> None:
    assert outcomes[attempt] == "done"


def alone(code: str) -> subprocess.CompletedProcess[str]:
    """Run code in a process that has set no_new_privs."""
    start = "from service.worker import kernel, landlock, seccomp\nkernel.prctl(38, 1)\n"
    return subprocess.run(
        [sys.executable, "-c", start + SETUP + code], capture_output=True, text=True, timeout=60, check=False
    )


@pytest.mark.skipif(landlock.version() < 4, reason="this kernel's Landlock does not know TCP")
def test_landlock_alone_denies_tcp() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        connect = f"socket.create_connection(('127.0.0.1', {listener.getsockname()[1]}))\n"
        assert alone(connect).returncode == 0
        ended = alone("landlock.restrict(landlock.Access())\n" + connect)
    assert "PermissionError" in ended.stderr.splitlines()[-1]


@NEEDS_SECCOMP
@pytest.mark.parametrize(
    "reach",
    [
        "os.sched_setscheduler({victim}, os.SCHED_IDLE, os.sched_param(0))",
        "os.setpriority(os.PRIO_PROCESS, {victim}, 19)",
        "import fcntl; fcntl.fcntl(os.pipe()[0], fcntl.F_SETOWN, {victim})",
        "import fcntl; fcntl.fcntl(os.pipe()[0], fcntl.F_SETSIG, signal.SIGKILL)",
    ],
)
def test_the_filter_alone_keeps_from_other_processes(reach: str) -> None:
    """Whatever the capabilities of the process, and without Landlock's scope of signals."""
    with subprocess.Popen(["sleep", "600"]) as victim:
        try:
            code = "import signal\n" + reach.format(victim=victim.pid)
            assert alone(code).returncode == 0
            ended = alone("seccomp.restrict()\n" + code)
            assert "PermissionError" in ended.stderr.splitlines()[-1]
            assert victim.poll() is None
        finally:
            victim.kill()


@NEEDS_SECCOMP
def test_the_filter_alone_keeps_others_on_their_cores() -> None:
    with subprocess.Popen(["sleep", "600"]) as victim:
        try:
            cores = os.sched_getaffinity(victim.pid)
            ended = alone(f"seccomp.restrict()\nos.sched_setaffinity({victim.pid}, {{{min(cores)}}})")
            assert ended.returncode == 0, ended.stderr  # nothing happens
            assert os.sched_getaffinity(victim.pid) == cores
            if len(cores) > 1:
                alone(f"os.sched_setaffinity({victim.pid}, {{{min(cores)}}})")
                assert os.sched_getaffinity(victim.pid) == {min(cores)}
        finally:
            victim.kill()


@NEEDS_SECCOMP
def test_calls_of_another_architecture_end_the_process() -> None:
    """On x86-64 a program can make 32-bit calls, which have other numbers; and so-called x32 ones."""
    if os.uname().machine != "x86_64":
        pytest.skip("only x86-64 has calls of other architectures")
    # mov eax, 20 (getpid); int 0x80; ret
    code = """
import mmap
page = mmap.mmap(-1, 4096, prot=7)
page.write(bytes.fromhex("b814000000cd80c3"))
run = ctypes.CFUNCTYPE(ctypes.c_int)(ctypes.addressof(ctypes.c_char.from_buffer(page)))
"""
    assert alone(code + "print(run() == os.getpid())").stdout == "True\n"
    assert alone("seccomp.restrict()\n" + code + "run()").returncode == -signal.SIGSYS
    x32 = alone("seccomp.restrict()\ncall(0x40000000 | 39)")
    assert "Errno 38" in x32.stderr


def test_no_thread_may_have_been_started_before() -> None:
    """It would keep what the process gives up."""
    code = (
        "import pathlib, time\nfrom service.worker.confinement import confine\n"
        "threading.Thread(target=time.sleep, args=(60,), daemon=True).start()\n"
        "confine(pathlib.Path('.'), [], pathlib.Path('/x'))"
    )
    assert "RuntimeError" in alone(code).stderr


@NEEDS_LANDLOCK
def test_the_data_is_private_even_where_python_looks_for_modules(tmp_path: Path) -> None:
    (tmp_path / "a_module.py").write_text("value = 1")
    (tmp_path / ".env").write_text("SECRET=1")
    (tmp_path / "data/uploads").mkdir(parents=True)
    (tmp_path / "data/uploads/model").write_text("of another job")
    (tmp_path / "scratch").mkdir()
    code = f"""
import pathlib, sys
from service.worker.confinement import confine
here = pathlib.Path({str(tmp_path)!r})
sys.path.insert(0, str(here))
confine(here / "scratch", [], here / "data")
import a_module
for path in (here / "data/uploads/model", here / ".env"):
    try:
        path.read_text()
    except PermissionError:
        print("denied")
"""
    ended = alone(code)
    assert ended.stdout == "denied\ndenied\n", ended.stderr


def test_the_probe_finds_what_this_kernel_has() -> None:
    found = probe()
    assert found.reads == found.writes == (landlock.version() >= 1)
    assert found.network == found.processes == seccomp.available()


def test_a_command_says_what_this_machine_has(monkeypatch: pytest.MonkeyPatch) -> None:
    full = Isolation(writes=True, reads=True, network=True, processes=True)
    monkeypatch.setattr(isolation, "probe", lambda: full)
    ended = CliRunner().invoke(cli.app, ["isolation"])
    assert (ended.exit_code, ended.output.count("active")) == (0, 4)
    monkeypatch.setattr(isolation, "probe", lambda: dataclasses.replace(full, network=False))
    ended = CliRunner().invoke(cli.app, ["isolation"])
    assert (ended.exit_code, ended.output.count("active")) == (1, 3)
    assert "A job can reach the network" in ended.output


def test_the_service_says_what_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(isolation, "probe", lambda: Isolation(writes=True, network=True, processes=True))
    with TestClient(create_app(Settings(data_dir=tmp_path / "data"))) as client:
        assert client.get("/health/ready").json()["isolation"]["reads"] is False
    assert "A job can read files of other jobs" in capsys.readouterr().err


def test_the_service_does_not_start_with_less_isolation_than_required(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(isolation, "probe", lambda: Isolation(reads=True, writes=True, processes=True))
    app = create_app(Settings(data_dir=tmp_path / "data", job_isolation="required"))
    with (
        pytest.raises(IsolationUnavailableError, match=r"A job can reach the network"),
        TestClient(app),
    ):
        pass


def test_the_commands_say_in_a_line_that_they_cannot_isolate(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(isolation, "probe", lambda: Isolation(reads=True, writes=True, processes=True))
    environment = {"ONNX_QAT_JOB_ISOLATION": "required"}
    ended = CliRunner().invoke(cli.app, ["serve", "--data-dir", str(tmp_path)], env=environment)
    assert ended.exit_code == 2
    (line,) = ended.stderr.splitlines()
    assert line.startswith("error: setting_invalid: ONNX_QAT_JOB_ISOLATION is `required`")
    assert line.endswith("A job can reach the network or local sockets.")


def test_an_api_that_runs_no_jobs_need_not_isolate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(isolation, "probe", lambda: Isolation(reads=True, writes=True, processes=True))
    monkeypatch.setattr(cli, "require_database", lambda settings: None)
    served: list[Settings] = []
    monkeypatch.setattr("service.server.serve", lambda settings, **options: served.append(settings))
    environment = {
        "ONNX_QAT_JOB_ISOLATION": "required",
        "ONNX_QAT_QUEUE": "celery",
        "ONNX_QAT_BROKER_URL": "redis://127.0.0.1:6379/0",
        "ONNX_QAT_DATABASE_URL": "postgresql://somebody@127.0.0.1/something",
    }
    ended = CliRunner().invoke(cli.app, ["serve", "--data-dir", str(tmp_path)], env=environment)
    assert ended.exit_code == 0, ended.output
    assert len(served) == 1


@pytest.mark.parametrize(
    ("limits", "code", "failure", "in_detail"),
    [
        (
            {"job_scratch_files": 500},
            "[(files / str(n)).touch() for n in range(10**6)]",
            "worker_output_too_large",
            "500 files",
        ),
        (
            {"job_scratch_bytes": 8 << 20},
            "[(files / str(n)).write_bytes(bytes(10**6)) for n in range(500)]; signal.pause()",
            "worker_output_too_large",
            "8388608 bytes",
        ),
        (
            {"job_scratch_bytes": 8 << 20},
            "f = (files / 'x').open('wb'); (files / 'x').unlink(); f.write(bytes(20 << 20)); f.flush(); "
            "signal.pause()",
            "worker_output_too_large",
            "8388608 bytes",
        ),
        (
            {"job_threads": 100},
            "[threading.Thread(target=signal.sigwait, args=([10],)).start() for _ in range(150)]; "
            "signal.pause()",
            "worker_crashed",
            "100 threads",
        ),
        (
            {"job_open_files": 64},
            "[open('/dev/null') for _ in range(100)]",
            None,
            "EMFILE",
        ),
    ],
    ids=["many files", "much in many files", "files without a name", "threads", "open files"],
)
def test_what_a_job_uses_is_limited(
    start_client, limits: dict[str, int], code: str, failure: str | None, in_detail: str
) -> None:
    client = start_client(**limits)
    # A comprehension sees only global names: those that `exec` was given.
    job = submit(client, {"do": "try", "codes": {"it": SETUP + code}})
    ended = wait_for(client, job, seconds=PATIENCE)
    if failure is None:
        assert client.get(f"/v1/jobs/{job}/files/outcomes.json").json() == {"it": in_detail}
    else:
        assert ended["failure"]["code"] == failure
        assert in_detail in ended["failure"]["detail"]


def test_a_job_that_has_ended_is_measured_too(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(bytes(1 << 20))
    assert excess(Limits(), None, tmp_path) is None
    assert excess(Limits(scratch_bytes=2 << 20, scratch_files=1), None, tmp_path) is None
    for limits in (Limits(scratch_bytes=1 << 19), Limits(scratch_files=0)):
        cause = excess(limits, None, tmp_path)
        assert cause is not None
        assert cause.code == "worker_output_too_large"


def test_what_a_job_leaves_behind_is_removed_however_deep_it_is(tmp_path: Path) -> None:
    """Deeper than a path can be long, deeper than Python recurses, with directories that cannot be read."""
    root = tmp_path / "scratch"
    root.mkdir()
    (root / "link").symlink_to(tmp_path)
    home = os.open(".", os.O_RDONLY)
    try:
        os.chdir(root)
        for _ in range(1500):
            Path("file").touch()
            Path("d" * 50).mkdir(0o700)
            os.chdir("d" * 50)
        Path("closed").mkdir(0)
    finally:
        os.fchdir(home)
        os.close(home)
    remove(root)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("status", "code", "in_detail"),
    [
        (-signal.SIGSEGV, "worker_crashed", "memory that it does not have"),
        (-signal.SIGBUS, "worker_crashed", "disk is full"),
        (-signal.SIGFPE, "worker_crashed", "height and width"),
        (-signal.SIGILL, "worker_crashed", "instruction"),
        (-signal.SIGABRT, "worker_crashed", "gave up"),
        (-signal.SIGSYS, "worker_crashed", "system call"),
        (-signal.SIGKILL, "worker_crashed", "killed"),
        (-signal.SIGXCPU, "worker_timeout", "CPU time"),
        (-signal.SIGXFSZ, "worker_output_too_large", "file larger"),
        (-signal.SIGUSR1, "worker_crashed", "SIGUSR1"),
        (-(signal.SIGRTMIN + 2), "worker_crashed", f"signal {signal.SIGRTMIN + 2}"),
        (0, "worker_crashed", "exit status 0"),
        (7, "worker_crashed", "exit status 7"),
    ],
)
def test_each_death_has_a_code_and_advice(status: int, code: str, in_detail: str) -> None:
    cause = cause_of_death(status, "calibrate", "", no_memory=False, no_cpu=False)
    assert cause.code == code
    assert in_detail in cause.detail
    assert "in stage 'calibrate'" in cause.detail
    early = cause_of_death(status, None, "", no_memory=False, no_cpu=False)
    assert "before its first stage" in early.detail


@pytest.mark.parametrize(
    ("status", "output", "no_memory", "no_cpu", "code"),
    [
        (-signal.SIGKILL, "", True, False, ServiceErrorCode.WORKER_OUT_OF_MEMORY),
        (-signal.SIGSEGV, "", True, False, ServiceErrorCode.WORKER_OUT_OF_MEMORY),
        (-signal.SIGFPE, "", True, False, ServiceErrorCode.WORKER_CRASHED),
        (-signal.SIGABRT, "what(): std::bad_alloc", False, False, ServiceErrorCode.WORKER_OUT_OF_MEMORY),
        (1, "MemoryError", False, False, ServiceErrorCode.WORKER_OUT_OF_MEMORY),
        (-signal.SIGKILL, "", False, True, ServiceErrorCode.WORKER_TIMEOUT),
    ],
)
def test_want_of_memory_and_time_are_told_from_other_deaths(
    status: int, output: str, no_memory: bool, no_cpu: bool, code: str
) -> None:
    assert cause_of_death(status, "load", output, no_memory=no_memory, no_cpu=no_cpu).code == code


def test_a_process_that_ignores_the_cpu_limit_is_a_timeout(start_client) -> None:
    client = start_client(job_cpu_seconds=6)
    burn = "signal.signal(signal.SIGXCPU, signal.SIG_IGN)\nwhile True: pass"
    job = submit(client, {"do": "try", "codes": {"it": SETUP + burn}})
    failure = wait_for(client, job, seconds=PATIENCE)["failure"]
    assert failure["code"] == "worker_timeout"
    assert "SIGKILL" in failure["detail"]


def test_native_code_that_does_not_look_whether_it_got_memory(start_client) -> None:
    client = start_client(job_memory_bytes=1 << 30)
    crash = "held = b'x' * (880 << 20)\nos.kill(os.getpid(), signal.SIGSEGV)"
    job = submit(client, {"do": "try", "codes": {"it": SETUP + crash}})
    assert wait_for(client, job, seconds=PATIENCE)["failure"]["code"] == "worker_out_of_memory"


@pytest.mark.parametrize("link", ["files", "files/a", "elsewhere"])
def test_a_result_holds_no_link(
    client: TestClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, link: str
) -> None:
    """Where the kernel lets a job make links, none is followed."""
    monkeypatch.setattr(process, "COMMAND", UNCONFINED_WORKER)
    target = tmp_path / "theirs"
    target.mkdir()
    (target / "file").write_text("of another job")
    code = (
        "import os, shutil\n"
        f"place = files.parent / {link!r}\n"
        "shutil.move(files, files.parent / 'moved') if place == files else None\n"
        f"os.symlink({str(target)!r}, place)"
    )
    job = submit(client, {"do": "try", "codes": {"it": code}, "files": {}})
    assert wait_for(client, job, seconds=PATIENCE)["failure"]["code"] == "internal_error"
    assert not (tmp_path / "data/results" / job).exists()
