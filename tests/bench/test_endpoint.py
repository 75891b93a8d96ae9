"""The client against a tiny server that speaks just enough of the OpenAI API."""

import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from fakes import row
from outpace.bench import BenchConfig, Suite, bench_endpoints
from outpace.bench.endpoint import EndpointMethod, endpoint_methods
from outpace.bench.trials import Job
from outpace.errors import ConfigError, UnsupportedError
from outpace.laws import Settings

WORDS = ["Once", " upon", " a", " time", "."]


class Handler(BaseHTTPRequestHandler):
    def log_message(self, *_):
        pass

    def do_GET(self):
        self.answer(json.dumps({"data": [{"id": "tiny"}]}))

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.seen.append((body, self.headers.get("Authorization")))
        if self.server.fails:
            self.answer(json.dumps({"error": "no such model"}), status=404)
            return
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.end_headers()
        time.sleep(self.server.prefill_s)
        for word in WORDS:
            self.event({"choices": [{"delta": {"content": word}, "finish_reason": None}]})
            time.sleep(self.server.token_s)
        self.event({"choices": [{"delta": {}, "finish_reason": "stop"}]})
        if self.server.counts:
            self.event({"choices": [], "usage": {"completion_tokens": 9, "prompt_tokens": 4}})
        self.wfile.write(b"data: [DONE]\n\n")

    def event(self, document):
        self.wfile.write(f"data: {json.dumps(document)}\n\n".encode())
        self.wfile.flush()

    def answer(self, text, status=200):
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text.encode())


@pytest.fixture
def serve():
    """A server; options say how it behaves."""
    running = []

    def start(*, prefill_s=0.0, token_s=0.0, counts=True, fails=False):
        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        server.prefill_s, server.token_s, server.counts, server.fails, server.seen = (
            prefill_s,
            token_s,
            counts,
            fails,
            [],
        )
        threading.Thread(target=server.serve_forever, daemon=True).start()
        running.append(server)
        return server, f"http://127.0.0.1:{server.server_address[1]}/v1"

    yield start
    for server in running:
        server.shutdown()
        server.server_close()


def job(**settings):
    return Job((), ({"role": "user", "content": "hi"},), Settings(**{"max_new_tokens": 16, "request": 0, **settings}))


def test_tokens_are_the_servers_count_and_the_first_one_is_timed(serve):
    server, url = serve(prefill_s=0.05, token_s=0.01)
    method = EndpointMethod("a", url)
    trial = method.answer([job(temperature=0.5, seed=7)])
    answer = trial.answers[0]
    assert method.model == "tiny"
    assert (answer.emitted, answer.prompt_tokens, answer.text) == (9, 4, "Once upon a time.")
    assert (answer.finish_reason, answer.tokens, answer.notes) == ("stop", (), ())
    assert 50 <= answer.ttft_ms < answer.total_ms
    assert answer.total_ms >= 90
    body, _ = server.seen[0]
    assert (body["temperature"], body["seed"], body["max_tokens"], body["stream"]) == (0.5, 7, 16, True)
    assert "ignore_eos" not in body


def test_without_a_count_chunks_are_counted_and_that_is_said(serve):
    _, url = serve(counts=False)
    answer = EndpointMethod("a", url, "named").answer([job(ignore_eos=True)]).answers[0]
    assert answer.emitted == len(WORDS)
    assert "chunks were counted" in answer.notes[0]


def test_a_batch_is_sent_at_once(serve):
    server, url = serve(prefill_s=0.3)
    trial = EndpointMethod("a", url, "tiny").answer([job()] * 4)
    assert len(server.seen) == 4
    assert trial.emitted == 36
    assert trial.total_ms < 1000  # four in a row would take 1200


def test_the_key_comes_from_the_environment(serve, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "not-a-real-key")
    server, url = serve()
    EndpointMethod("a", url, "tiny").answer([job()])
    assert server.seen[0][1] == "Bearer not-a-real-key"


def test_two_servers_are_paired_and_their_texts_compared_as_strings(serve):
    _, slow = serve(token_s=0.02)
    _, fast = serve()
    questions = Suite("own", tuple(_question(i) for i in range(4)), "", "")
    config = BenchConfig(drafters=(), stock=(), repetitions=1, max_new_tokens=16, warm_up_runs=0)
    result = bench_endpoints([f"plain={slow}", f"spec={fast},tiny"], config, questions)
    found = row(result, "spec")
    assert found["headline"]["ratio"] > 2
    assert found["headline"]["claim"] == "faster"
    assert found["parity"]["same text"] == 4
    assert result["floor"] is None
    from outpace.bench.report import render_html, render_markdown

    assert "4/4 same text" in render_markdown(result)
    assert "4/4 same text" in render_html(result)


def _question(number):
    from outpace.bench import Question

    return Question(number, str(number), "chat", (f"question {number}",), "chat")


def test_what_goes_wrong_is_said(serve):
    server, url = serve(fails=True)
    with pytest.raises(UnsupportedError, match=r"answered 404 .*no such model"):
        EndpointMethod("a", url, "tiny").answer([job()])
    server.shutdown()
    server.server_close()
    with pytest.raises(UnsupportedError, match="is the server up"):
        EndpointMethod("a", url, "tiny").answer([job()])
    with pytest.raises(ConfigError, match="expected something like http"):
        EndpointMethod("a", "localhost:8000")
    with pytest.raises(ConfigError, match="NAME=URL"):
        endpoint_methods(["http://localhost:8000/v1"])
