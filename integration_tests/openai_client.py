"""
Talks to ``vllm serve`` as users do: the openai client, in the serve environment.

``openai_client.py JOB RESULT`` reads a job and writes a result, both JSON. A job with
``num_requests`` is a load, any other one request of each kind.
"""

import asyncio
import json
import math
import random
import statistics
import sys
import time
from pathlib import Path
from typing import Any

from openai import AsyncOpenAI, OpenAI

from nbl_modifier.evaluation.texts import load_texts

API_KEY = "none"  # vllm serve asks for no key, the client insists on one
# Of one request; many times what 64 in parallel take on two cores.
TIMEOUT_SECONDS = 300
SHORTEST_PROMPT, LONGEST_PROMPT = 8, 1_600  # characters, about three per token
SHORTEST_ANSWER, LONGEST_ANSWER = 4, 128  # tokens


def ask_each_way(job: dict[str, Any]) -> dict[str, Any]:
    """
    Return what completions, chat and streaming answer to one prompt.

    :param job: url, model, prompt (token ids), chat (a user's message), max_tokens
    """
    client = OpenAI(base_url=f"{job['url']}/v1", api_key=API_KEY)
    greedy: dict[str, Any] = {
        "model": job["model"],
        "temperature": 0.0,
        "max_tokens": job["max_tokens"],
        "extra_body": {"ignore_eos": True},
    }
    messages: Any = [{"role": "user", "content": job["chat"]}]
    as_tokens = greedy | {"extra_body": {"ignore_eos": True, "return_token_ids": True}}
    completion = client.completions.create(prompt=job["prompt"], **as_tokens)
    chunks = list(
        client.completions.create(prompt=job["prompt"], stream=True, **greedy)
    )
    chat = client.chat.completions.create(messages=messages, **greedy)
    deltas = list(
        client.chat.completions.create(messages=messages, stream=True, **greedy)
    )
    return {
        "models": [model.id for model in client.models.list()],
        "completion": completion.choices[0].text,
        "tokens": completion.choices[0].model_extra["token_ids"],
        "streamed": [chunk.choices[0].text for chunk in chunks],
        "chat": chat.choices[0].message.content,
        "chat_tokens": chat.usage.completion_tokens,
        "chat_streamed": [delta.choices[0].delta.content or "" for delta in deltas],
    }


def load(job: dict[str, Any]) -> dict[str, Any]:
    """
    Send requests of mixed length and kind, so many at a time; return what came back.

    Answers have no end of text, so that each must have as many tokens as it asked for.

    :param job: url, model, num_requests, concurrency
    :return: requests, failures (messages), tokens, seconds, and the median and the 99th
        percentile of the seconds from sending a request to the end of its answer
    """
    generator = random.Random(0)
    # No more tokens than characters, so that every prompt fits.
    texts = [text for text in load_texts("stdlib", "heldout") if text.isascii()]
    requests = [_request(generator, texts) for _ in range(job["num_requests"])]
    started_at = time.perf_counter()
    answers = asyncio.run(_send_all(job, requests))
    seconds = time.perf_counter() - started_at
    latencies = sorted(answer["seconds"] for answer in answers)
    return {
        "requests": len(answers),
        "failures": [answer["failure"] for answer in answers if answer["failure"]],
        "tokens": sum(answer["tokens"] for answer in answers),
        "prompt_tokens": sum(answer["prompt_tokens"] for answer in answers),
        "seconds": seconds,
        "p50": statistics.median(latencies),
        "p99": latencies[math.ceil(0.99 * len(latencies)) - 1],
    }


def _request(generator: random.Random, texts: list[str]) -> dict[str, Any]:
    """Return a request: lengths spread evenly on a logarithmic scale, any kind."""
    text = generator.choice(texts)
    length = _log_uniform(generator, SHORTEST_PROMPT, LONGEST_PROMPT)
    start = generator.randrange(max(1, len(text) - length))
    return {
        "chat": generator.random() < 0.5,
        "prompt": text[start : start + length],
        "stream": generator.random() < 0.5,
        "max_tokens": _log_uniform(generator, SHORTEST_ANSWER, LONGEST_ANSWER),
        "temperature": generator.choice((0.0, 0.8)),
    }


def _log_uniform(generator: random.Random, low: int, high: int) -> int:
    return round(math.exp(generator.uniform(math.log(low), math.log(high))))


async def _send_all(
    job: dict[str, Any], requests: list[dict[str, Any]]
) -> list[dict[str, Any]]:
    places = asyncio.Semaphore(job["concurrency"])
    async with AsyncOpenAI(
        base_url=f"{job['url']}/v1",
        api_key=API_KEY,
        timeout=TIMEOUT_SECONDS,
        max_retries=0,  # a failure is to be seen
    ) as client:

        async def send(request: dict[str, Any]) -> dict[str, Any]:
            async with places:
                return await _send(client, job["model"], request)

        return await asyncio.gather(*map(send, requests))


async def _send(
    client: AsyncOpenAI, model: str, request: dict[str, Any]
) -> dict[str, Any]:
    started_at = time.perf_counter()
    arguments = {
        "model": model,
        "max_tokens": request["max_tokens"],
        "temperature": request["temperature"],
        "extra_body": {"ignore_eos": True},
    }
    create: Any = client.completions.create
    if request["chat"]:
        create = client.chat.completions.create
        arguments["messages"] = [{"role": "user", "content": request["prompt"]}]
    else:
        arguments["prompt"] = request["prompt"]
    usage, failure = None, None
    try:
        if request["stream"]:
            options = {"stream": True, "stream_options": {"include_usage": True}}
            async for chunk in await create(**arguments, **options):
                usage = chunk.usage or usage
        else:
            usage = (await create(**arguments)).usage
        got = usage.completion_tokens if usage is not None else 0
        if got != request["max_tokens"]:
            failure = f"{got} tokens instead of {request['max_tokens']}"
    except Exception as err:  # noqa: BLE001  # whatever it is, it is counted and shown
        failure = f"{type(err).__name__}: {err}"
    return {
        "seconds": time.perf_counter() - started_at,
        "tokens": usage.completion_tokens if usage is not None else 0,
        "prompt_tokens": usage.prompt_tokens if usage is not None else 0,
        "failure": failure,
    }


if __name__ == "__main__":
    job = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    result = load(job) if "num_requests" in job else ask_each_way(job)
    Path(sys.argv[2]).write_text(json.dumps(result), encoding="utf-8")
