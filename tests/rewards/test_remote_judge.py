"""Judges on a server that is real, on this machine, and often broken."""

from __future__ import annotations

import base64
import io
import json
import math
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from alignkit.errors import RecipeError, RewardError
from alignkit.rewards import describe, evaluate, load
from alignkit.rewards.http_json import Bounds, JSONServer, ServerFailure
from alignkit.rewards.judges import YesProbability
from alignkit.rewards.ratings import PairJudge, Rating
from alignkit.rewards.remote_judge import RemoteModel, first_token, messages, whole_text
from alignkit.rewards.vision_language import Chat
from alignkit.types import Prompt

KEY = "sk-very-secret"
QUICK = {"timeout": 2.0, "budget": 5.0, "first_wait": 0.01}


def logprobs(**tokens: float) -> dict[str, Any]:
    """A chat completion whose first token has these probabilities."""
    top = [{"token": token.replace("_", " "), "logprob": math.log(p)} for token, p in tokens.items()]
    return {"choices": [{"message": {"content": top[0]["token"]}, "logprobs": {"content": [{"top_logprobs": top}]}}]}


def said(text: str, reason: str = "stop") -> dict[str, Any]:
    return {"choices": [{"message": {"content": text}, "finish_reason": reason}]}


@dataclass
class Answer:
    """One HTTP answer. `body` is sent as it is where it is bytes, otherwise as JSON."""

    body: Any
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)


@dataclass
class Server:
    """What is answered, by turns (the last one again and again), or by a function of the request."""

    answers: list[Answer] | Callable[[dict[str, Any]], Answer]
    requests: list[dict[str, Any]] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    times: list[float] = field(default_factory=list)
    busy: int = 0
    busiest: int = 0
    address: str = ""
    lock: threading.Lock = field(default_factory=threading.Lock)

    def answer(self, path: str, headers: dict[str, str], body: dict[str, Any]) -> Answer:
        with self.lock:
            self.times.append(time.monotonic())
            self.headers.append(headers)
            self.requests.append({"path": path, **body})
            if callable(self.answers):
                return self.answers(body)
            return self.answers[min(len(self.requests), len(self.answers)) - 1]


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def serve() -> Iterator[Callable[..., Server]]:
    running: list[ThreadingHTTPServer] = []

    def start(*answers: Any) -> Server:
        script: Any = (
            answers[0] if callable(answers[0]) else [a if isinstance(a, Answer) else Answer(a) for a in answers]
        )
        state = Server(script)

        class Requests(BaseHTTPRequestHandler):
            def log_message(self, format: str, *args: Any) -> None: ...

            def do_GET(self) -> None:
                self._reply({})

            def do_POST(self) -> None:
                self._reply(json.loads(self.rfile.read(int(self.headers["content-length"]))))

            def _reply(self, body: dict[str, Any]) -> None:
                with state.lock:
                    state.busy += 1
                    state.busiest = max(state.busiest, state.busy)
                answer = state.answer(self.path, dict(self.headers.items()), body)
                content = answer.body if isinstance(answer.body, bytes) else json.dumps(answer.body).encode()
                with state.lock:
                    state.busy -= 1
                self.send_response(answer.status)
                for name, value in {"content-length": str(len(content)), **answer.headers}.items():
                    self.send_header(name, value)
                self.end_headers()
                try:
                    self.wfile.write(content)
                except OSError:  # the other side had seen enough
                    self.close_connection = True

        server = ThreadingHTTPServer(("127.0.0.1", 0), Requests)
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        running.append(server)
        state.address = f"http://127.0.0.1:{server.server_port}/v1"
        return state

    yield start
    for server in running:
        server.shutdown()
        server.server_close()


def judge(server: Server | str, **options: Any) -> YesProbability:
    address = server if isinstance(server, str) else server.address
    return YesProbability(server=address, weights="judge-7b", options={**QUICK, **options})


def pictures(number: int = 1) -> torch.Tensor:
    return torch.rand(number, 3, 8, 12, generator=torch.Generator().manual_seed(0))


def prompts(number: int = 1) -> list[Prompt]:
    return [Prompt(f"sign {i}", id=i) for i in range(number)]


def test_the_yes_probability_is_that_of_all_spellings_the_server_lists(serve: Callable[..., Server]) -> None:
    server = serve(logprobs(Yes=0.4, _yes=0.2, No=0.1, YES=0.05, Maybe=0.05))
    scores = judge(server)(pictures(), prompts())
    torch.testing.assert_close(scores, torch.tensor([0.65 / 0.75]))
    whole = YesProbability(server=server.address, weights="judge-7b", options=QUICK, among="vocabulary")
    torch.testing.assert_close(whole(pictures(), prompts()), torch.tensor([0.65]))


def test_the_request_is_a_chat_completion_with_the_picture_as_png(serve: Callable[..., Server]) -> None:
    server = serve(logprobs(yes=0.5, no=0.5))
    judge(server)(pictures(), prompts())
    (request,) = server.requests
    assert request["path"] == "/v1/chat/completions"
    assert request["model"] == "judge-7b"
    assert (request["temperature"], request["max_tokens"], request["logprobs"], request["top_logprobs"]) == (
        0,
        1,
        True,
        20,
    )
    image, text = request["messages"][0]["content"]
    assert text["text"].startswith("Caption: sign 0\nDoes this image")
    head, _, data = image["image_url"]["url"].partition(",")
    assert head == "data:image/png;base64"
    shown = np.array(Image.open(io.BytesIO(base64.b64decode(data))))
    np.testing.assert_array_equal(shown, (pictures()[0].permute(1, 2, 0).numpy() * 255).round().astype(np.uint8))


def test_answers_go_to_the_samples_they_belong_to_and_the_concurrency_is_bounded(serve: Callable[..., Server]) -> None:
    def by_prompt(body: dict[str, Any]) -> Answer:
        number = int(body["messages"][0]["content"][1]["text"].split("\n")[0].split()[-1])
        return Answer(logprobs(yes=(number + 1) / 20, no=1 - (number + 1) / 20))

    server = serve(by_prompt)
    scores = judge(server, concurrency=3)(pictures(12), prompts(12))
    torch.testing.assert_close(scores, torch.arange(1, 13) / 20)
    assert server.busiest <= 3


def test_a_server_that_fails_twice_is_asked_again(serve: Callable[..., Server]) -> None:
    server = serve(Answer({}, 500), Answer({}, 503), logprobs(yes=0.75, no=0.25))
    torch.testing.assert_close(judge(server)(pictures(), prompts()), torch.tensor([0.75]))
    assert len(server.requests) == 3


def test_a_busy_server_is_left_alone_as_long_as_it_asks(serve: Callable[..., Server]) -> None:
    server = serve(Answer({}, 429, {"retry-after": "0.3"}), logprobs(yes=0.75, no=0.25))
    judge(server)(pictures(), prompts())
    assert server.times[1] - server.times[0] >= 0.3


def test_a_server_that_asks_for_more_time_than_there_is_fails_at_once(serve: Callable[..., Server]) -> None:
    server = serve(Answer({}, 429, {"retry-after": "3600"}))
    start = time.monotonic()
    with pytest.raises(RewardError, match="answered 429"):
        judge(server)(pictures(), prompts())
    assert time.monotonic() - start < 1
    assert len(server.requests) == 1


def test_retries_are_bounded_in_number_and_in_total_time(serve: Callable[..., Server]) -> None:
    server = serve(Answer({}, 500))
    with pytest.raises(ServerFailure, match=r"500.*after 3 tries"):
        JSONServer(server.address, bounds=Bounds(retries=2, first_wait=0.01)).ask("models")
    assert len(server.requests) == 3
    start = time.monotonic()
    with pytest.raises(ServerFailure, match="500"):
        JSONServer(server.address, bounds=Bounds(retries=1000, first_wait=0.05, budget=0.5)).ask("models")
    assert time.monotonic() - start < 0.8


def test_a_request_that_is_wrong_is_not_repeated(serve: Callable[..., Server]) -> None:
    server = serve(Answer({"error": "no such model"}, 404))
    with pytest.raises(ServerFailure, match="404.*no such model"):
        JSONServer(server.address).ask("chat/completions", {})
    assert len(server.requests) == 1


def test_a_redirect_is_not_followed(serve: Callable[..., Server]) -> None:
    elsewhere = serve(logprobs(yes=1.0))
    server = serve(Answer({}, 307, {"location": f"{elsewhere.address}/chat/completions"}))
    with pytest.raises(RewardError, match="answered 307"):
        judge(server)(pictures(), prompts())
    assert not elsewhere.requests


def test_cookies_are_not_kept(serve: Callable[..., Server]) -> None:
    server = serve(Answer(logprobs(yes=1.0), headers={"set-cookie": "who=you; Path=/"}))
    asking = judge(server)
    for _ in range(2):
        asking(pictures(), prompts())
    assert len(server.headers) == 2
    assert not any(name.lower() == "cookie" for headers in server.headers for name in headers)


def test_a_refused_connection_is_an_error_that_names_the_address() -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        port = closed.getsockname()[1]
    with pytest.raises(RewardError, match=f"127.0.0.1:{port}/v1 cannot be reached: ConnectError"):
        judge(f"http://127.0.0.1:{port}/v1", retries=1)(pictures(), prompts())


@pytest.mark.parametrize("begins", [b"", b"HTTP/1.1 200 OK\r\ncontent-length: 500\r\n\r\n{"], ids=["silent", "half"])
def test_a_connection_that_is_closed_half_way_is_tried_again_and_then_an_error(begins: bytes) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        accepted: list[int] = []

        def hang_up() -> None:
            for _ in range(2):
                connection, _ = listener.accept()
                accepted.append(1)
                connection.recv(65536)
                connection.sendall(begins)
                connection.close()

        threading.Thread(target=hang_up, daemon=True).start()
        server = JSONServer(f"http://127.0.0.1:{listener.getsockname()[1]}", bounds=Bounds(retries=1, first_wait=0.01))
        with pytest.raises(ServerFailure, match="cannot be reached: RemoteProtocolError.*after 2 tries"):
            server.ask("models")
    assert len(accepted) == 2


@pytest.mark.parametrize("drip", [False, True], ids=["silent", "one byte at a time"])
def test_a_server_that_never_finishes_costs_no_more_than_the_budget(drip: bool) -> None:
    stop = threading.Event()
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def stall() -> None:
            connection, _ = listener.accept()
            with connection:
                connection.recv(65536)
                connection.sendall(b"HTTP/1.1 200 OK\r\ncontent-length: 500\r\n\r\n")
                while drip and not stop.wait(0.05):
                    connection.sendall(b" ")
                stop.wait(5)

        threading.Thread(target=stall, daemon=True).start()
        bounds = Bounds(timeout=0.4, budget=0.6, retries=0)
        start = time.monotonic()
        with pytest.raises(ServerFailure, match="took more than|ReadTimeout"):
            JSONServer(f"http://127.0.0.1:{listener.getsockname()[1]}", bounds=bounds).ask("models")
        assert time.monotonic() - start < 1.5
        stop.set()


def test_a_huge_answer_is_cut_off_while_it_streams(serve: Callable[..., Server]) -> None:
    server = serve(Answer(b"[" + b" " * 40_000_000))
    with pytest.raises(ServerFailure, match="more than 1000000 bytes"):
        JSONServer(server.address, bounds=Bounds(max_bytes=1_000_000)).ask("models")


def test_an_answer_that_would_unpack_to_more_is_refused(serve: Callable[..., Server]) -> None:
    server = serve(Answer(b"\x1f\x8b", headers={"content-encoding": "gzip"}))
    with pytest.raises(ServerFailure, match="compressed"):
        JSONServer(server.address).ask("models")


@pytest.mark.parametrize("body", [b"<html>busy</html>", b'{"choices": NaN}', b"[Infinity]", b"", b"[" * 100_000])
def test_an_answer_that_is_no_json_is_an_error_and_not_repeated(serve: Callable[..., Server], body: bytes) -> None:
    server = serve(Answer(body))
    with pytest.raises(ServerFailure, match="answered no JSON"):
        JSONServer(server.address).ask("models")
    assert len(server.requests) == 1


@pytest.mark.parametrize(
    ("reply", "match"),
    [
        ([], "0 choices"),
        ({"choices": []}, "0 choices"),
        ({"choices": logprobs(yes=0.5)["choices"] * 2}, "2 choices"),
        ({"choices": [{"message": {"content": "yes"}}]}, "sent no logprobs"),
        ({"choices": [{"logprobs": {"content": []}}]}, "sent no logprobs"),
        ({"choices": [{"logprobs": {"content": [{"top_logprobs": [{"token": "yes", "logprob": 3}]}]}}]}, "are none"),
        ({"choices": [{"logprobs": {"content": [{"top_logprobs": [{"token": 1, "logprob": 0}]}]}}]}, "are none"),
        (logprobs(Perhaps=0.9, I=0.1), "begins with none of yes, no, but with 'Perhaps', 'I'"),
    ],
)
def test_a_reply_that_holds_no_answer_is_a_failure(reply: Any, match: str) -> None:
    with pytest.raises(ServerFailure, match=match):
        first_token(reply, ("yes", "no"))


def test_an_answer_the_server_does_not_list_has_probability_zero() -> None:
    assert first_token(logprobs(yes=0.9, Maybe=0.1), ("yes", "no")) == [pytest.approx(math.log(0.9)), -math.inf]


def test_the_first_word_of_a_reply_counts_only_where_it_was_asked_for(serve: Callable[..., Server]) -> None:
    server = serve(said("Yes, it does."))
    with pytest.raises(RewardError, match="no logprobs.*from_text"):
        judge(server)(pictures(), prompts())
    torch.testing.assert_close(judge(server, from_text=True)(pictures(), prompts()), torch.tensor([1.0]))
    assert "logprobs" not in server.requests[-1]


def test_a_question_without_an_answer_costs_its_own_sample_and_is_never_zero(
    serve: Callable[..., Server], caplog: pytest.LogCaptureFixture
) -> None:
    def second_is_garbage(body: dict[str, Any]) -> Answer:
        second = "sign 1\n" in body["messages"][0]["content"][1]["text"]
        return Answer({"choices": []} if second else logprobs(yes=0.8, no=0.2))

    evaluation = evaluate(judge(serve(second_is_garbage)), pictures(3), prompts(3))
    torch.testing.assert_close(evaluation.scores[[0, 2]], torch.tensor([0.8, 0.8]))
    assert evaluation.failed.tolist() == [False, True, False]
    assert "0 choices" in caplog.text


def test_marks_and_verdicts_come_from_a_server_as_from_a_model_in_process(serve: Callable[..., Server]) -> None:
    server = serve({"choices": logprobs(**{"3": 0.5, "4": 0.25, "_5": 0.25})["choices"]})
    rating = Rating(server=server.address, weights="m", options=QUICK)
    torch.testing.assert_close(rating(pictures(), prompts()), torch.tensor([0.5 * 3 + 0.25 * 4 + 0.25 * 5]))
    server = serve(said("My mark is\nMARK: 4"))
    written = Rating(server=server.address, weights="m", options=QUICK, read="text", marker="MARK:")
    torch.testing.assert_close(written(pictures(), prompts()), torch.tensor([4.0]))
    server = serve(logprobs(**{"1": 0.6, "0": 0.2, "2": 0.2}))
    pair = PairJudge(server=server.address, weights="m", options=QUICK)
    torch.testing.assert_close(pair.compare(pictures(), pictures(), prompts()), torch.tensor([0.7]))


def test_a_reply_that_was_cut_off_is_a_failure() -> None:
    with pytest.raises(ServerFailure, match="cut off"):
        whole_text(said("Final Sco", "length"))
    with pytest.raises(ServerFailure, match="without a text"):
        whole_text({"choices": [{"message": {"content": None}}]})


def test_a_key_is_sent_and_never_shown(
    serve: Callable[..., Server], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("DEBUG")
    monkeypatch.setenv("MY_JUDGE_KEY", KEY)
    server = serve(Answer(f"bad key {KEY}".encode(), 401))
    reward = judge(server, key_variable="MY_JUDGE_KEY")
    with pytest.raises(RewardError, match=r"401: bad key \*\*\*") as caught:
        reward(pictures(), prompts())
    assert server.headers[0]["authorization"] == f"Bearer {KEY}"
    everywhere = f"{caught.value} {caplog.text} {reward!r} {reward.engine!r} {json.dumps(describe(reward))}"
    assert KEY not in everywhere
    echo = judge(serve(Answer(f"you said {KEY}".encode())), key_variable="MY_JUDGE_KEY")
    with pytest.raises(RewardError, match=r"no JSON .*you said \*\*\*"):
        echo(pictures(), prompts())
    assert KEY not in caplog.text
    monkeypatch.delenv("MY_JUDGE_KEY")
    with pytest.raises(RecipeError, match="MY_JUDGE_KEY.*not set"):
        reward(pictures(), prompts())


def test_a_server_is_reached_before_the_first_rollout_or_the_run_fails(serve: Callable[..., Server]) -> None:
    server = serve({"data": [{"id": "judge-7b"}]})
    judge(server).prepare()
    assert server.requests[0]["path"] == "/v1/models"
    with pytest.raises(RecipeError, match="serves judge-7b, not other"):
        YesProbability(server=server.address, weights="other", options=QUICK).prepare()


@pytest.mark.parametrize(
    "address", ["127.0.0.1:8000", "ftp://host/v1", "http://user:pw@host/v1", "http://", "http://h/?k=1"]
)
def test_what_is_no_address_is_refused_without_showing_it(address: str) -> None:
    with pytest.raises(RecipeError, match="a server is given as") as caught:
        JSONServer(address)
    assert "pw" not in str(caught.value).replace("password", "")


def test_options_that_a_server_has_not_are_refused() -> None:
    with pytest.raises(RecipeError, match="no option temperature; it takes .*key_variable"):
        RemoteModel.make("http://127.0.0.1:1/v1", "m", {"temperature": 1})


def test_a_judge_on_a_server_has_no_gradient_and_needs_no_files() -> None:
    spec = 'alignkit.rewards.judges:YesProbability(server="http://127.0.0.1:1/v1", options={"timeout": 2.0})'
    reward = load(spec)
    assert isinstance(reward, YesProbability)
    assert not reward.differentiable and reward.files() == ()


def test_a_video_is_sent_as_evenly_spaced_frames() -> None:
    video = torch.arange(10).reshape(10, 1, 1, 1).expand(10, 3, 2, 2) / 10
    content = messages(Chat(("Look:", video)), max_frames=5)[0]["content"]
    assert [part["type"] for part in content] == ["text", *["image_url"] * 5]
    shown = [Image.open(io.BytesIO(base64.b64decode(p["image_url"]["url"].partition(",")[2]))) for p in content[1:]]
    assert [round(image.getpixel((0, 0))[0] / 25.5) for image in shown] == [1, 3, 5, 7, 9]
