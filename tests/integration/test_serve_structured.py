"""Structured output by a real small model: whatever the schema, a complete answer is valid."""

from __future__ import annotations

import json
import queue
import threading
from collections import Counter
from typing import Any

import jsonschema
import pytest

from tests.fakes.models import smollm2_path
from tests.fakes.random_schemas import SchemaLot
from tests.fakes.raw_http import Client
from tests.fakes.running_server import RunningServer, real_server

N_SCHEMAS = 200
N_STREAMS = 8
MAX_TOKENS = 160


def test_the_answers_to_200_random_schemas_are_valid(tmp_path_factory: pytest.TempPathFactory):
    """The sampling is wild, so that the grammar is what keeps the answer in shape."""
    lot = SchemaLot(2025)
    todo: queue.SimpleQueue[tuple[int, dict[str, Any]]] = queue.SimpleQueue()
    for i in range(N_SCHEMAS):
        todo.put((i, lot.schema()))
    reasons: Counter[str] = Counter()
    failures: list[str] = []
    folder = tmp_path_factory.mktemp("serve")
    with real_server(folder, smollm2_path(), n_parallel=N_STREAMS, ctx=512) as server:
        threads = [
            threading.Thread(target=ask_all, args=(server, todo, reasons, failures))
            for _ in range(N_STREAMS)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert failures == []
    assert reasons.total() == N_SCHEMAS and reasons["stop"] >= N_SCHEMAS - 10, reasons


def ask_all(server: RunningServer, todo: Any, reasons: Counter[str], failures: list[str]) -> None:
    client = Client(server.address)
    try:
        while True:
            i, schema = todo.get_nowait()
            try:
                reasons[ask(client, schema, i)] += 1
            except Exception as error:
                failures.append(f"{json.dumps(schema, ensure_ascii=False)}: {error!r}")
    except queue.Empty:
        pass
    finally:
        client.close()


def ask(client: Client, schema: dict[str, Any], seed: int) -> str:
    """Why the answer ended; raises for one that is not valid."""
    form = {"type": "json_schema", "json_schema": {"name": "x", "strict": True, "schema": schema}}
    body = {
        "messages": [{"role": "user", "content": "Hi"}],
        "model": "SmolLM2-135M-Instruct.Q4_1",
        "response_format": form,
        "temperature": 1.2,
        "seed": seed,
        "max_tokens": MAX_TOKENS,
    }
    client.request("POST /v1/chat/completions", body=json.dumps(body).encode())
    answer = client.read_answer()
    assert answer.status == 200, answer
    (choice,) = answer.json()["choices"]
    text = choice["message"]["content"]
    if choice["finish_reason"] == "stop":
        jsonschema.Draft202012Validator(schema).validate(json.loads(text))
    return str(choice["finish_reason"])
