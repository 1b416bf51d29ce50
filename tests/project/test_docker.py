"""The image and the services around it: what can be told without building or starting them."""

import http.server
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import threading
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from mico_chat.encode import CacheStats
from mico_chat.engine.base import EngineStats
from mico_chat.errors import MediaError
from mico_chat.media.medium import MediaReport
from mico_chat.wire import Usage
from mico_server.app import DRAIN_S
from mico_server.http.request_log import Metrics
from mico_server.settings import ServerSettings

COMPOSE = shutil.which("docker-compose")
PROMTOOL = shutil.which("promtool")

FILES = ("compose.yaml", "compose.gpu.yaml")
ENVIRONMENT = {"POSTGRES_PASSWORD": "for-the-test", "GRAFANA_PASSWORD": "for-the-test"}


@pytest.fixture
def docker(root: Path) -> Path:
    return root / "docker"


def instructions(dockerfile: Path) -> list[list[tuple[str, str]]]:
    """Name and arguments of every instruction, by stage; those before the first FROM come first."""
    text = re.sub(r"^\s*#.*\n", "", dockerfile.read_text(), flags=re.MULTILINE)
    stages: list[list[tuple[str, str]]] = [[]]
    for line in re.sub(r"\\\n\s*", "", text).splitlines():
        if line.strip():
            name, _, arguments = line.partition(" ")
            if name == "FROM":
                stages.append([])
            stages[-1].append((name, arguments))
    return stages


def named(stage: list[tuple[str, str]], name: str) -> list[str]:
    return [arguments for found, arguments in stage if found == name]


def in_context(root: Path) -> list[str]:
    lines = (root / ".dockerignore").read_text().splitlines()
    assert lines[1] == "*", "everything is left out but for what is named"
    return [line.removeprefix("!") for line in lines if line.startswith("!")]


def test_the_image_has_what_it_copies(root: Path, docker: Path) -> None:
    allowed = in_context(root)
    assert all((root / path).exists() for path in allowed)
    project = tomllib.loads((root / "pyproject.toml").read_text())
    packages = project["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]
    assert {package.split("/")[0] for package in packages} < set(allowed)
    used = set()
    for stage in instructions(docker / "Dockerfile"):
        for copied in named(stage, "COPY"):
            if "--from=" not in copied:
                used |= set(copied.split()[:-1])
    assert used == set(allowed)


def test_the_last_stage_builds_nothing_and_runs_without_root(docker: Path) -> None:
    last = instructions(docker / "Dockerfile")[-1]
    runs = named(last, "RUN")
    assert not any(re.search(r"g\+\+|\bgcc\b|cmake|type=cache", run) for run in runs)
    (install,) = [run for run in runs if "pip install" in run]
    assert "--no-index --no-deps --no-cache-dir" in install
    names = [name for name, _ in last]
    assert not set(names[names.index("USER") :]) & {"RUN", "COPY", "ADD"}
    (user,) = named(last, "USER")
    assert any(f"useradd --uid {user.partition(':')[0]}" in run for run in runs)


def test_a_change_of_code_alone_installs_no_package_again(docker: Path) -> None:
    """Its layers come behind those of all packages, and the stages of these copy none of it."""
    stages = {stage[0][1].split()[-1]: stage for stage in instructions(docker / "Dockerfile")[1:]}
    *_, last = stages.values()
    for name in ("requirements", "dependencies"):
        copied = {part for words in named(stages[name], "COPY") for part in words.split()[:-1]}
        assert not copied & {"mico_chat", "server", "training", "ui", "README.md", "."}, name
    kinds = ["dependencies" in words for kind, words in last if kind == "COPY"]
    assert kinds[0]
    installs = [
        at for at, (kind, words) in enumerate(last) if kind == "RUN" and "/package" in words
    ]
    assert installs[0] > max(at for at, (kind, _) in enumerate(last) if kind == "COPY")


def test_the_process_gets_signals_itself_and_its_health_is_asked(docker: Path) -> None:
    last = instructions(docker / "Dockerfile")[-1]
    assert json.loads(named(last, "ENTRYPOINT")[0]) == ["mico-chat"]
    assert json.loads(named(last, "CMD")[0]) == ["serve"]
    _, script = json.loads(named(last, "HEALTHCHECK")[0].partition("CMD ")[2])
    assert f"docker/healthcheck.py {script}" in named(last, "COPY")
    for folder in json.loads(named(last, "VOLUME")[0]):
        assert re.search(rf"_DIR={folder}\b", named(last, "ENV")[0]), folder


def test_llama_cpp_is_built_as_make_builds_it_but_for_any_machine(root: Path, docker: Path) -> None:
    (makes,) = re.findall(r"^export CMAKE_ARGS \?= (.*)$", (root / "Makefile").read_text(), re.M)
    (images,) = re.findall(r'^ARG CMAKE_ARGS="(.*)"$', (docker / "Dockerfile").read_text(), re.M)
    assert images.split() == ["-DGGML_NATIVE=OFF", *makes.replace("$(CURDIR)", "").split()]


def test_requirements_are_the_projects_own(root: Path, docker: Path) -> None:
    script, project = docker / "requirements.py", root / "pyproject.toml"

    def asked(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, str(script), str(project), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    lines = asked("server,postgres").stdout.splitlines()
    assert any(line.startswith("asyncpg>=") for line in lines)
    assert any(line.startswith("uvicorn[standard]>=") for line in lines)
    assert not any(line.startswith(("gradio", "vllm", "pytest")) for line in lines)
    few = asked("server", "torch", "torchvision").stdout.splitlines()
    assert [re.split("[<>]", line)[0] for line in few] == ["torch", "torchvision"]
    gpu = yaml.safe_load((docker / "compose.gpu.yaml").read_text())
    (default,) = re.findall(r"^ARG EXTRAS=(.*)$", (docker / "Dockerfile").read_text(), re.M)
    for extras in ("", default, gpu["x-gpu"]["build"]["args"]["EXTRAS"]):
        assert asked(extras).returncode == 0
    for wrong in (("serve",), ("server", "tensorflow")):
        result = asked(*wrong)
        assert (result.returncode, result.stdout) == (1, "")
        assert result.stderr.startswith("error: no ")
        assert wrong[-1] in result.stderr


def locked(file: Path) -> dict[str, tuple[str, int]]:
    """The version of each package of a lock file, and the number of its hashes."""
    found = {}
    for entry in re.sub(r"^#.*\n", "", file.read_text()).replace(" \\\n", "").splitlines():
        requirement, *hashes = entry.split("    ")
        name, version = requirement.partition(" ;")[0].split("==")
        assert all(re.fullmatch("--hash=sha256:[0-9a-f]{64}", one) for one in hashes), entry
        found[name] = version, len(hashes)
    return found


def test_the_locks_have_what_the_image_asks_for(root: Path, docker: Path) -> None:
    image = (docker / "Dockerfile").read_text()
    (extras,), (for_extras,) = (
        re.findall(rf"^ARG {name}=(.*)$", image, re.MULTILINE) for name in ("EXTRAS", "LOCKED")
    )
    assert extras == for_extras
    rest, torch = (locked(docker / name) for name in ("requirements.lock", "torch.lock"))
    assert not rest.keys() & torch.keys()
    assert {"torch", "torchvision"} < torch.keys()
    files = rest | torch
    assert all(hashes for _, hashes in files.values())
    command = [sys.executable, docker / "requirements.py", root / "pyproject.toml", extras]
    asked = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    for requirement in map(Requirement, asked):
        found = files.get(canonicalize_name(requirement.name))
        assert found is not None, f"{requirement}: make lock"
        assert requirement.specifier.contains(found[0]), f"{requirement}: make lock"
    for name in ("requirements.lock", "torch.lock"):
        text = (docker / name).read_text()
        assert extras in text.splitlines()[0], "make lock"
        assert not re.search(r"://|index|\.org|\.com", text), "an address"
    installs = re.findall(r"pip install (.*?)(?:;|\n\n)", image.replace("\\\n", " "), re.DOTALL)
    for lock in ("requirements.lock", "torch.lock"):
        (install,) = [one for one in installs if lock in one]
        assert "--require-hashes" in install
        assert "--no-deps" in install


def test_images_are_named_by_digest(docker: Path) -> None:
    compose, image = ((docker / name).read_text() for name in ("compose.yaml", "Dockerfile"))
    named = re.findall(r"\$\{(\w+_IMAGE):-(\S+)\}$", compose, re.MULTILINE)
    others = {name: default for name, default in named if name != "MICO_IMAGE"}
    assert set(others) == {f"{n}_IMAGE" for n in ("MICO_BASE", "POSTGRES", "PROMETHEUS", "GRAFANA")}
    for default in others.values():
        assert re.fullmatch(r"[\w./-]+:[\w.-]*\d[\w.-]*@sha256:[0-9a-f]{64}", default)
    assert f"\nARG BASE_IMAGE={others['MICO_BASE_IMAGE']}\n" in image


def test_no_secret_is_written_down(root: Path, docker: Path) -> None:
    for file in ("Dockerfile", ".env.example", *FILES, "prometheus.yaml"):
        for line in (docker / file).read_text().splitlines():
            secret = re.search(r"(PASSWORD|TOKEN|SECRET|API_KEY)\w*\s*[:=]\s*(.*)$", line)
            assert secret is None or re.fullmatch(r"(\$\{\w+:\?[^}]*\})?", secret[2]), line
            assert not re.search(r"://\w+:[^@/\s]+@", line), line
    assert "/docker/.env" in (root / ".gitignore").read_text().splitlines()
    assert not any("docker/.env".startswith(path) for path in in_context(root))


def configured(docker: Path, *files: str, **environment: str) -> dict[str, Any]:
    assert COMPOSE is not None
    named = [word for file in files for word in ("--file", str(docker / file))]
    result = subprocess.run(
        [COMPOSE, "--env-file", os.devnull, *named, "config", "--format", "json"],
        env={"PATH": os.environ["PATH"], **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    config: dict[str, Any] = json.loads(result.stdout)
    return config


needs_compose = pytest.mark.skipif(COMPOSE is None, reason="needs Debian's package docker-compose")


@needs_compose
@pytest.mark.parametrize("files", [FILES[:1], FILES])
def test_compose_takes_the_files(docker: Path, files: tuple[str, ...]) -> None:
    config = configured(docker, *files, **ENVIRONMENT)
    services = config["services"]
    assert set(services) == {
        *("setup", "metrics-key", "server", "ui"),
        *("postgres", "prometheus", "grafana"),
    }
    for name, service in services.items():
        for other in service.get("depends_on", {}):
            healthy = service["depends_on"][other]["condition"] == "service_healthy"
            assert not (healthy and services[other].get("healthcheck", {}).get("disable")), name
        for port in service.get("ports", []):
            assert port["host_ip"] == "127.0.0.1", name
        for volume in service.get("volumes", []):
            if volume["type"] == "bind":
                assert Path(volume["source"]).exists(), volume
            else:
                assert volume["source"] in config["volumes"]
        assert service["cap_drop"] == ["ALL"]
        assert service["read_only"] is True
        assert service["security_opt"] == ["no-new-privileges:true"]
        # A limit of memory holds what lies in a tmpfs and in shared memory too.
        sizes = [re.fullmatch(r"/[\w/]+:size=(\d+)([mg])", where) for where in service["tmpfs"]]
        tmpfs = sum(int(size[1]) << {"m": 20, "g": 30}[size[2]] for size in sizes if size)
        assert None not in sizes
        assert tmpfs + int(service.get("shm_size", 0)) < int(service["mem_limit"]), name
        assert 0 < service["pids_limit"] <= 4096
    for name in ("setup", "metrics-key", "server", "ui"):
        assert services[name]["image"] == services["server"]["image"]
    assert "ports" not in services["postgres"]
    grace = re.fullmatch(r"(?:(\d+)m)?(\d+)s", services["server"]["stop_grace_period"])
    assert grace is not None
    answers = ServerSettings.model_fields["shutdown_timeout_s"].default
    # A busy machine took 12 seconds more to end the rest.
    assert int(grace[1] or 0) * 60 + int(grace[2]) >= answers + DRAIN_S + 20


@needs_compose
def test_who_is_open_to_whom(docker: Path) -> None:
    services = configured(docker, "compose.yaml", MICO_BIND="0.0.0.0", **ENVIRONMENT)["services"]
    bound = {n: [p["host_ip"] for p in s["ports"]] for n, s in services.items() if "ports" in s}
    here, everywhere = ["127.0.0.1"], ["0.0.0.0"]
    assert bound == {"server": everywhere, "ui": everywhere, "prometheus": here, "grafana": here}

    def beside(name: str) -> set[str]:
        own = set(services[name]["networks"])
        return {n for n, s in services.items() if n != name and own & set(s["networks"])}

    assert beside("postgres") == {"server", "metrics-key"}
    assert beside("prometheus") == {"server", "grafana"}
    assert beside("ui") == {"server", "setup"}
    # A body that is on its way lies on the disk, in a volume, and not in memory.
    temporary = services["server"]["environment"]["TMPDIR"]
    assert temporary in [v["target"] for v in services["server"]["volumes"] if "read_only" not in v]


@needs_compose
def test_limits_are_variables(docker: Path) -> None:
    text = (docker / "compose.yaml").read_text()
    limits = dict(re.findall(r"\$\{(\w+_(?:MEMORY|PIDS|TMP)):-(\w+)\}", text))
    assert {"MICO_MEMORY", "MICO_UI_MEMORY", "POSTGRES_MEMORY", "MICO_UI_TMP"} < set(limits)
    given = {name: "123m" if default[-1] in "mg" else "123" for name, default in limits.items()}
    services = configured(docker, *FILES, **given, **ENVIRONMENT)["services"].values()
    assert {int(service["mem_limit"]) for service in services} == {123 << 20}
    assert {service["pids_limit"] for service in services} == {123}


@needs_compose
@pytest.mark.parametrize("missing", sorted(ENVIRONMENT))
def test_compose_wants_its_passwords(docker: Path, missing: str) -> None:
    with pytest.raises(AssertionError, match=f"{missing}.*docker/.env"):
        configured(docker, "compose.yaml", **{**ENVIRONMENT, missing: ""})


@needs_compose
def test_a_gpu_is_asked_for(docker: Path) -> None:
    config = configured(docker, *FILES, MICO_MODELS="/", MICO_GPUS="2", **ENVIRONMENT)
    server = config["services"]["server"]
    (device,) = server["deploy"]["resources"]["reservations"]["devices"]
    assert device == {"driver": "nvidia", "count": 2, "capabilities": ["gpu"]}
    assert server["command"] == ["serve", "--engine", "vllm"]
    models = next(volume for volume in server["volumes"] if volume["target"] == "/models")
    assert (models["type"], models["source"], models["read_only"]) == ("bind", "/", True)


def exported() -> dict[str, set[str]]:
    """Every sample of /metrics, with its labels, after one of each thing that is counted."""
    engine = EngineStats(
        **dict.fromkeys(("running", "waiting", "slots", "cells_used", "cells"), 1),
        **dict.fromkeys(("prompt_tokens", "cached_tokens", "completion_tokens"), 1),
    )
    cache = CacheStats(hits=5, misses=6, entries=7, bytes=800, max_bytes=9000)
    metrics = Metrics(lambda: engine, lambda: cache)
    usage = Usage(prompt_tokens=100, completion_tokens=20, media_tokens=64, cached_tokens=10)
    media = [MediaReport(name="a", kind="image", decode_ms=20.0, encode_ms=30.0)]
    metrics.answered(usage, media)
    metrics.failed(MediaError("a", "no picture"))
    metrics.first_token(0.1)
    metrics.request({"type": "http", "path": "/v1/chat", "method": "POST"}, 429, 0.1)
    return {
        sample.name: set(sample.labels)
        for family in metrics.registry.collect()
        for sample in family.samples
        if not sample.name.endswith("_created")
    }


def dashboard(docker: Path) -> Any:
    return json.loads((docker / "grafana" / "dashboards" / "mico-chat.json").read_text())


def expressions(docker: Path) -> list[str]:
    return [target["expr"] for panel in dashboard(docker)["panels"] for target in panel["targets"]]


def test_every_metric_of_the_dashboard_is_one_of_the_server(docker: Path) -> None:
    folder = docker / "grafana" / "provisioning" / "datasources"
    (source,) = yaml.safe_load((folder / "prometheus.yaml").read_text())["datasources"]
    for panel in dashboard(docker)["panels"]:
        assert {target["datasource"]["uid"] for target in panel["targets"]} == {source["uid"]}
    samples = exported() | {"up": {"job", "instance"}}
    shown = set()
    for expression in expressions(docker):
        bare = re.sub(r'"[^"]*"', '""', expression)
        found = re.findall(r"\b(?:mico_\w+|process_\w+|up\b)", bare)
        assert found, expression
        assert set(found) <= set(samples), expression
        labels = {*re.findall(r"(\w+)\s*[=!]~?\"", bare)}
        labels |= {label for by in re.findall(r"by \(([^)]*)\)", bare) for label in by.split(", ")}
        assert labels <= {"job", "instance"}.union(*(samples[name] for name in found)), expression
        shown |= set(found)
    # What the server counts of its own is all there to see, but for how many entries a cache has.
    own, seen = (
        {re.sub("_(bucket|sum|count)$", "", name) for name in names if name.startswith("mico_")}
        for names in (samples, shown)
    )
    assert own - seen == {"mico_context_cache_entries"}


def test_prometheus_asks_the_server_with_the_key_that_is_made_for_it(docker: Path) -> None:
    config = yaml.safe_load((docker / "prometheus.yaml").read_text())
    compose = yaml.safe_load((docker / "compose.yaml").read_text())["services"]
    (job,) = config["scrape_configs"]
    assert job["job_name"] == "mico-chat"  # as the dashboard asks for it
    assert job["static_configs"] == [{"targets": ["server:8000"]}]
    file = job["authorization"]["credentials_file"]
    (script,) = compose["metrics-key"]["command"]
    assert f"mv /keys/new {file}" in script
    assert re.findall(r"--scope (\w+)", script) == ["metrics"]
    (pattern,) = re.findall(r'grep -q "(.*?)"', script)
    row = "key-1  prometheus  key-1  {}  60/minute  2026-01-01 10:00  {}"
    in_force = re.compile(pattern.replace("$$", "$"))  # Compose's way to write a $
    assert in_force.search(row.format("metrics", "-"))
    assert not in_force.search(row.format("metrics", "2026-01-01 10:00"))
    assert not in_force.search(row.format("chat,metrics", "-")), "of a time before scopes"
    assert "keys:/keys:ro" in compose["prometheus"]["volumes"]


@pytest.mark.skipif(PROMTOOL is None, reason="needs Debian's package prometheus")
def test_prometheus_takes_its_file_and_the_dashboards_queries(docker: Path, tmp_path: Path) -> None:
    assert PROMTOOL is not None
    rules = [
        {"record": f"dashboard:{number}", "expr": expression.replace("$__rate_interval", "1m")}
        for number, expression in enumerate(expressions(docker))
    ]
    groups = {"groups": [{"name": "dashboard", "rules": rules}]}
    (tmp_path / "rules.yaml").write_text(yaml.safe_dump(groups))
    checks = (
        ["config", "--syntax-only", str(docker / "prometheus.yaml")],
        ["rules", str(tmp_path / "rules.yaml")],
    )
    for check in checks:
        result = subprocess.run([PROMTOOL, "check", *check], capture_output=True, text=True)
        assert result.returncode == 0, result.stderr


class Answers(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(200 if self.path in ("/health/ready", "/") else 503)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def port() -> Iterator[int]:
    with http.server.HTTPServer(("127.0.0.1", 0), Answers) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server.server_port
        server.shutdown()
        thread.join()


def health(docker: Path, *arguments: object, **environment: str) -> tuple[int, str]:
    result = subprocess.run(
        [sys.executable, docker / "healthcheck.py", *map(str, arguments)],
        # A proxy would answer for anybody.
        env={"http_proxy": "http://127.0.0.1:9", **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.stdout == ""
    return result.returncode, result.stderr


def test_the_health_of_a_container(docker: Path, port: int) -> None:
    assert health(docker, port) == (0, "")
    assert health(docker, port, "/") == (0, "")
    assert health(docker, MICO_SERVER_PORT=str(port)) == (0, "")
    assert health(docker, port, "/no") == (1, "error: /no answers 503\n")
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        code, said = health(docker, closed.getsockname()[1])
    assert code == 1
    assert re.fullmatch(r"error: port \d+: .*refused\n", said)
