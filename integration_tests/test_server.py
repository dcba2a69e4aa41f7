"""
``vllm serve`` on the loopback interface, driven by the openai client.

The load is bounded in count and time: ``CORE_REQUESTS`` in ``make test``, and
``FULL_REQUESTS`` in ``make integration``, minutes of work for each of two servers.
"""

import contextlib
import json
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from integration_tests.harness import serve_python, vllm_environment
from integration_tests.materials import prompts
from integration_tests.reference import reference
from integration_tests.rows import DEMO_MODEL
from integration_tests.server import Server, serving

pytestmark = pytest.mark.requires_vllm

CLIENT = Path(__file__).with_name("openai_client.py")
RECIPE = "default_stage: {default_modifiers: {NBLModifier: {num_layers: 6}}}"
NUM_LAYERS, NUM_LINEARIZED = 16, 6
CONCURRENCY = 64
CORE_REQUESTS, FULL_REQUESTS = 128, 20_000
EAGER = ("--enforce-eager", "--dtype=float32")
FULL_SECONDS = 1_800
# One turn is enough to see that a template is applied; the model has seen none.
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}# {{ message.content }}\n{% endfor %}"
)

Record = Callable[[str, object], None]


def ask(server: Server, timeout: float = 300, **job: Any) -> dict[str, Any]:
    """Run the client in the serve environment and return its result."""
    path = server.log.with_suffix(".client.json")
    result = server.log.with_suffix(".answer.json")
    content = {"url": server.url, "model": DEMO_MODEL} | job
    path.write_text(json.dumps(content), encoding="utf-8")
    command = [serve_python(), str(CLIENT), str(path), str(result)]
    subprocess.run(command, check=True, timeout=timeout)
    answer: dict[str, Any] = json.loads(result.read_text(encoding="utf-8"))
    return answer


@pytest.fixture(scope="module")
def serve(
    checkpoint: Callable[..., Path], workplace: Path
) -> Iterator[Callable[..., Server]]:
    """Return a function that starts a server once: ``base`` or ``nbl``, arguments."""
    recipes = {"base": None, "nbl": RECIPE}
    running: dict[tuple[str, ...], Server] = {}
    template = workplace / "chat_template.jinja"
    template.write_text(CHAT_TEMPLATE, encoding="utf-8")
    with contextlib.ExitStack() as servers:

        def start(name: str, *arguments: str) -> Server:
            key = (name, *arguments)
            if key not in running:
                server = serving(
                    str(Path(serve_python()).with_name("vllm")),
                    checkpoint(recipes[name]),
                    workplace / f"server-{len(running)}.log",
                    vllm_environment(workplace / "vllm_cache"),
                    *("--served-model-name", DEMO_MODEL),
                    *("--chat-template", str(template)),
                    *("--max-model-len", "2048", "--max-num-seqs", str(CONCURRENCY)),
                    *arguments,
                )
                running[key] = servers.enter_context(server)
            return running[key]

        yield start


def test_completions_chat_and_streaming(
    checkpoint: Callable[..., Path], serve: Callable[..., Server]
) -> None:
    expected = reference(checkpoint(RECIPE), "float32", DEMO_MODEL).tokens
    index = len(expected) // 2
    answer = ask(
        serve("nbl", *EAGER),
        prompt=prompts(DEMO_MODEL)[index],
        chat="read a file into a list of lines",
        max_tokens=len(expected[index]),
    )
    assert answer["models"] == [DEMO_MODEL]
    assert answer["tokens"] == expected[index]
    assert answer["chat_tokens"] == len(expected[index])
    for whole, pieces in (("completion", "streamed"), ("chat", "chat_streamed")):
        assert len(answer[pieces]) > 1
        assert "".join(answer[pieces]) == answer[whole]
        assert answer[whole].strip()


@pytest.mark.parametrize(
    ("num_requests", "arguments"),
    [
        pytest.param(CORE_REQUESTS, EAGER, id="core"),
        pytest.param(
            FULL_REQUESTS,
            (),  # as in production: compiled, and in the checkpoint's dtype
            id="full",
            marks=[pytest.mark.slow, pytest.mark.timeout(2 * FULL_SECONDS + 600)],
        ),
    ],
)
def test_load(
    num_requests: int,
    arguments: tuple[str, ...],
    serve: Callable[..., Server],
    record_property: Record,
) -> None:
    """
    Every request, 64 at a time, is answered in full, and where attention was replaced
    the same memory holds K / (K - m) times the tokens.
    """
    capacities = {}
    for name in ("base", "nbl"):
        server = serve(name, *arguments)
        before = server.counter("vllm:request_success_total")
        answer = ask(
            server,
            timeout=FULL_SECONDS,
            num_requests=num_requests,
            concurrency=CONCURRENCY,
        )
        capacities[name] = server.kv_cache_tokens()
        failures = answer.pop("failures")
        figures = {
            "requests": answer["requests"],
            "failures": len(failures),
            "prompt tokens": answer["prompt_tokens"],
            "tokens": answer["tokens"],
            "p50": f"{answer['p50']:.2f} s",
            "p99": f"{answer['p99']:.2f} s",
            "in all": f"{answer['seconds']:.0f} s",
            "KV cache": f"{capacities[name]} tokens",
        }
        for figure, value in figures.items():
            record_property(f"{name} {figure}", value)
        assert not failures, failures[:3]
        after = server.counter("vllm:request_success_total")
        assert answer["requests"] == after - before == num_requests
        assert server.counter("vllm:num_requests_running") == 0
    ratio = NUM_LAYERS / (NUM_LAYERS - NUM_LINEARIZED)
    # Memory is cut into whole blocks, of 128 tokens; both capacities may miss one.
    assert capacities["nbl"] == pytest.approx(ratio * capacities["base"], abs=256)
