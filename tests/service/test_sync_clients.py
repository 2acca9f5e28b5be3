"""The blocking clients against the real service: legacy loops, time-outs, threads, Ctrl-C, fork, the end."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from fwasync import errors, types
from fwasync.sync.client import ReconnectableClient
from fwasync.sync.service import ServiceClient
from fwasync.sync.training import TrainingClient
from fwasync.testing import Fault, FaultPlan, ScriptedService, SlowFuture, blocking_local_service

MODEL = "fwasync/qwen3-tiny"
ADAM = types.AdamParams(learning_rate=3e-3)


def datum(text: str) -> types.Datum:
    tokens = list(text.encode())
    return types.Datum(
        model_input=types.ModelInput.from_ints(tokens[:-1]),
        loss_fn_inputs={"target_tokens": tokens[1:], "weights": [1.0] * (len(tokens) - 1)},
    )


BATCH = [datum("to be, or not to be")]


@dataclass
class Endpoint:
    base_url: str
    job_id: str = "job-1"
    job_name: str = "accounts/me/rlorTrainerJobs/job-1"


def cross_entropy(data: list[types.Datum], logprobs: list[torch.Tensor]) -> tuple[torch.Tensor, dict[str, float]]:
    return -torch.stack([values.sum() for values in logprobs]).sum(), {"mine": 7.0}


@pytest.fixture(scope="module")
def shared() -> Iterator[ScriptedService]:
    with blocking_local_service() as service:
        yield service


@pytest.fixture
def local(shared: ScriptedService) -> Iterator[ScriptedService]:
    yield shared
    shared.set_faults(FaultPlan())
    assert threads() == []


@pytest.fixture
def client(local: ScriptedService) -> Iterator[TrainingClient]:
    with ServiceClient(local.base_url, local.api_key) as service:
        with service.create_training_client(MODEL, lora_rank=0) as client:
            yield client


def threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name == "fwasync-sync"]


def reconnectable(local: ScriptedService, **more: Any) -> ReconnectableClient:
    more = {"fw_api_key": local.api_key, "endpoint": Endpoint(local.base_url), **more}
    return ReconnectableClient(None, "job-1", MODEL, **more)


def test_a_recipe_of_the_cookbook_learns_saves_and_resumes(local: ScriptedService) -> None:
    client = reconnectable(local)
    assert client.job_id == client.endpoint.job_id == "job-1"
    losses = []
    for _ in range(5):
        losses.append(client.forward_backward(BATCH, "cross_entropy").metrics["loss:sum"])
        client.optim_step(ADAM)
    for _ in range(3):
        output = client.forward_backward_custom(BATCH, cross_entropy)
        assert output.metrics["mine"] == 7.0
        losses.append(output.metrics["loss:sum"])
        client.optim_step(ADAM, grad_accumulation_normalization="NUM_LOSS_TOKENS")
    assert losses == sorted(losses, reverse=True)
    path = client.save_state("step-8").path
    assert "step-8" in client.list_checkpoints()
    assert client.resolve_checkpoint_path("step-8", "job-0") == "cross_job://job-0/step-8"
    assert client.save_weights_for_sampler_ext("sampler").snapshot_name.startswith("sampler-")
    before = client.forward(BATCH, "cross_entropy").metrics["loss:sum"]
    client.close()
    client.close()
    with reconnectable(local) as resumed:
        resumed.load_state_with_optimizer(path)
        assert resumed.forward(BATCH, "cross_entropy").metrics["loss:sum"] == before
    with pytest.raises(errors.ClosedError):
        resumed.list_checkpoints()


@pytest.mark.parametrize("kind", ["blocking", "async"])
def test_the_manager_is_asked_for_the_endpoint(local: ScriptedService, kind: str) -> None:
    asked = []

    class Blocking:
        def wait_for_existing(self, job_id: str) -> Endpoint:
            asked.append((job_id, threading.current_thread()))
            return Endpoint(local.base_url, job_id)

    class Async:
        async def wait_for_existing(self, job_id: str) -> Endpoint:
            return Blocking().wait_for_existing(job_id)

    manager = Blocking() if kind == "blocking" else Async()
    with ReconnectableClient(manager, "job-7", MODEL, fw_api_key=local.api_key) as client:
        assert client.endpoint == Endpoint(local.base_url, "job-7")
    [(job_id, thread)] = asked
    assert job_id == "job-7"
    assert (thread is threading.current_thread()) == (kind == "blocking")


def test_the_default_time_out_of_the_cookbook_client_is_that_of_its_verbs(local: ScriptedService) -> None:
    local.set_faults(FaultPlan([Fault(SlowFuture(), route) for route in ("forward", "forward_backward", "optim_step")]))
    with reconnectable(local, default_timeout=0.05) as client:
        assert client.save_state("quick").path  # which has its own
        for verb in (
            lambda: client.forward(BATCH, "cross_entropy"),
            lambda: client.forward_backward(BATCH),
            lambda: client.forward_backward_custom(BATCH, cross_entropy),
            lambda: client.optim_step(ADAM),
        ):
            with pytest.raises(errors.OperationTimeoutError):
                verb()
        local.set_faults(FaultPlan())  # which lets them go


def test_the_key_comes_from_the_environment(local: ScriptedService, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FWASYNC_API_KEY", raising=False)
    monkeypatch.setenv("FIREWORKS_API_KEY", local.api_key)
    with reconnectable(local, fw_api_key=None) as client:
        assert client.list_checkpoints() is not None
    monkeypatch.delenv("FIREWORKS_API_KEY")
    with pytest.raises(errors.UsageError, match="FIREWORKS_API_KEY"):
        reconnectable(local, fw_api_key=None)
    with pytest.raises(errors.UsageError, match="rlor_mgr"):
        reconnectable(local, endpoint=None)
    with pytest.raises(errors.AuthenticationError):
        reconnectable(local, fw_api_key="wrong")


def test_the_twins_train_and_sample(local: ScriptedService) -> None:
    with ServiceClient(local.base_url, local.api_key) as service:
        assert MODEL in [model.model_name for model in service.get_server_capabilities().supported_models]
        with service.create_training_client(MODEL, lora_rank=4) as client:
            before = client.forward_backward(BATCH).metrics["loss:sum"]
            client.optim_step(ADAM)
            assert client.forward(BATCH).metrics["loss:sum"] < before
            assert client.get_info().lora_rank == client.lora_rank == 4
            snapshot = client.save_weights_for_sampler("one")
            path = client.save_state("one").path
        with service.create_training_client_from_state(path) as again:
            assert again.base_model == MODEL
        with service.create_sampling_client(model_path=snapshot.path) as sampler:
            prompt = types.ModelInput.from_ints(list(b"to be"))
            params = types.SamplingParams(max_tokens=3, seed=1)
            assert len(sampler.sample(prompt, 2, params).sequences) == 2
            assert sampler.compute_logprobs(prompt)[0] is None
    with pytest.raises(errors.ClosedError):
        sampler.compute_logprobs(prompt)


def test_a_twin_is_entered_once_and_before_it_is_used(local: ScriptedService) -> None:
    service = ServiceClient(local.base_url, local.api_key)
    with pytest.raises(errors.ClosedError, match="`with"):
        service.get_server_capabilities()
    with service:
        pass
    with pytest.raises(errors.UsageError, match="entered once"):
        service.__enter__()


def test_futures_are_submitted_in_order_and_asked_later(client: TrainingClient) -> None:
    pairs = [(client.inner.forward_backward(BATCH), client.inner.optim_step(ADAM)) for _ in range(4)]
    losses = [fb.result().metrics["loss:sum"] for fb, _ in pairs]
    assert losses == sorted(losses, reverse=True)
    assert [opt.result(timeout=None).metrics is not None for _, opt in pairs] == [True] * 4
    assert {(fb.state, fb.took_effect, fb.cancel()) for fb, _ in pairs} == {("done", True, False)}
    late = client.inner.forward(BATCH)
    client.close()  # which waits for it
    assert late.result(timeout=0).metrics["loss:sum"] < losses[-1]


def test_a_failure_that_nobody_asked_for_is_raised_at_the_end(local: ScriptedService) -> None:
    with ServiceClient(local.base_url, local.api_key) as service:
        with pytest.raises(errors.FwasyncError, match="nonsense"):
            with service.create_training_client(MODEL) as client:
                client.inner.forward(BATCH, "nonsense")


def test_a_time_out_keeps_the_operation(local: ScriptedService, client: TrainingClient) -> None:
    local.set_faults(FaultPlan([Fault(SlowFuture(), "forward_backward", nth=1)]))
    with pytest.raises(errors.OperationTimeoutError, match=r"admitt(ed|ing)") as caught:
        client.forward_backward(BATCH, timeout=2)  # in which it is to be sent
    future: Any = caught.value.future
    while future.state == "admitting":  # the answer to its submission may be late
        time.sleep(0.001)
    with pytest.raises(TimeoutError) as again:
        future.result(timeout=0.05)
    assert again.value.future is future
    assert (future.state, future.took_effect) == ("admitted", True)
    assert future.request_id is not None
    local.release()
    assert future.result().metrics["loss:sum"] > 0
    assert future.result(timeout=0).metrics["loss:sum"] > 0
    client.optim_step(ADAM)


def test_a_time_out_keeps_also_what_is_queued(client: TrainingClient) -> None:
    started, free = threading.Event(), threading.Event()

    def slow(data: list[types.Datum], logprobs: list[torch.Tensor]) -> tuple[torch.Tensor, dict[str, float]]:
        started.set()
        free.wait()
        return cross_entropy(data, logprobs)

    try:
        custom = client.inner.forward_backward_custom(BATCH, slow)
        queued, unwanted = client.inner.optim_step(ADAM), client.inner.forward(BATCH)
        started.wait()
        for timeout in (0, 0.01):
            with pytest.raises(errors.OperationTimeoutError, match=r"optim_step .* queued") as caught:
                queued.result(timeout=timeout)
        assert caught.value.future is queued
        assert unwanted.cancel()
        with pytest.raises(errors.OperationWithdrawnError):
            unwanted.result()
        with pytest.raises(errors.OperationTimeoutError) as caught:
            client.forward(BATCH, timeout=0.01)
        blocking: Any = caught.value.future
        assert blocking.state == "withdrawn"  # nobody holds on to what a blocking verb waited for in vain
        assert queued.state == "queued"
    finally:
        free.set()
    assert queued.result().metrics["grad_norm"] > 0
    assert custom.result().metrics["mine"] == 7.0


def test_many_clients_share_a_thread_and_threads_share_a_client(local: ScriptedService) -> None:
    with ServiceClient(local.base_url, local.api_key) as service:
        clients = [service.create_training_client(MODEL, lora_rank=2) for _ in range(3)]
        with clients[0], clients[1], clients[2], ThreadPoolExecutor(6) as pool:
            outputs = list(pool.map(lambda i: clients[i % 3].forward_backward(BATCH).metrics["loss:sum"], range(12)))
            assert len(threads()) == 1
        assert len(set(outputs)) == 1  # no optimizer step, so whichever came first
    counts = [len(operations) for operations in local.effects().values()]
    assert counts[-3:] == [4, 4, 4]


async def test_it_works_in_a_notebook_whose_loop_runs(local: ScriptedService) -> None:
    with reconnectable(local) as client:
        assert client.forward(BATCH, "cross_entropy").metrics["loss:sum"] > 0


def test_the_loops_own_thread_is_refused(client: TrainingClient) -> None:
    async def loss(data: Any, logprobs: list[torch.Tensor]) -> tuple[torch.Tensor, dict[str, float]]:
        client.forward(data)
        return cross_entropy(data, logprobs)

    with pytest.raises(errors.UsageError, match=r"await AsyncTrainingClient\.forward\(\.\.\.\)"):
        client.forward_backward_custom(BATCH, loss)
    assert client.forward(BATCH).metrics["loss:sum"] > 0


HEAD = """
import os, signal, sys, threading, time
from fwasync import errors, types
from fwasync.sync.client import ReconnectableClient
from fwasync.sync.service import ServiceClient

class Endpoint:
    base_url, job_id, job_name = sys.argv[1], "job", "job"

def open_client():
    return ReconnectableClient(None, "job", "fwasync/qwen3-tiny", 0, sys.argv[2], endpoint=Endpoint())

def threads_left():
    others = [thread for thread in threading.enumerate() if thread is not threading.current_thread()]
    assert "fwasync-sync" not in [thread.name for thread in others]
    for thread in others:
        thread.join(60)  # idle workers of the loop, which were told to end
    return threading.active_count() - 1

def press_ctrl_c_once_it_waits():
    def press():
        while True:
            frame = sys._current_frames()[threading.main_thread().ident]
            while frame is not None:
                if frame.f_code.co_qualname == "Latch.wait":
                    return os.kill(os.getpid(), signal.SIGINT)
                frame = frame.f_back
            time.sleep(0.001)
    threading.Thread(target=press).start()

TOKENS = list(b"to be, or not to be")
BATCH = [types.Datum(model_input=types.ModelInput.from_ints(TOKENS[:-1]),
                     loss_fn_inputs={"target_tokens": TOKENS[1:], "weights": [1.0] * (len(TOKENS) - 1)})]
"""


def start(local: ScriptedService, program: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-W", "error", "-c", HEAD + program, local.base_url, local.api_key],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process: subprocess.Popen[str]) -> tuple[str, str]:
    try:
        return process.communicate(timeout=100)
    finally:
        process.kill()


@pytest.mark.skipif(sys.platform == "win32", reason="signals of POSIX")
def test_ctrl_c_ends_the_wait_and_leaves_the_client_good(local: ScriptedService) -> None:
    local.set_faults(FaultPlan([Fault(SlowFuture(), "forward_backward", nth=1)]))
    process = start(
        local,
        """
client = open_client()
slow = client.inner.forward_backward(BATCH)
while slow.state != "admitted":
    time.sleep(0.001)
press_ctrl_c_once_it_waits()
try:
    slow.result()
except KeyboardInterrupt:
    print(slow.state, slow.took_effect)
print(client.list_checkpoints() is not None)
started, free = threading.Event(), threading.Event()
def loss(data, logprobs):
    started.set(); free.wait()
    return -sum(p.sum() for p in logprobs), {}
custom = client.inner.forward_backward_custom(BATCH, loss)
queued = client.inner.optim_step(types.AdamParams())
started.wait()
press_ctrl_c_once_it_waits()
try:
    queued.result()
except KeyboardInterrupt:
    print(queued.state, queued.took_effect)
free.set()
custom.result()
print("releasing", flush=True)
slow.result(); client.close()
print(threads_left())
""",
    )
    assert process.stdout is not None
    said = []
    for line in process.stdout:
        said.append(line.strip())
        if line == "releasing\n":
            local.release()
    assert finish(process)[1] == ""
    assert said == ["admitted True", "True", "withdrawn False", "releasing", "0"]
    assert process.returncode == 0


@pytest.mark.skipif(sys.platform == "win32", reason="signals of POSIX")
@pytest.mark.parametrize("block", ["with open_client() as client:", "client = open_client()\nif True:"])
def test_ctrl_c_ends_a_program_soon(local: ScriptedService, block: str) -> None:
    local.set_faults(FaultPlan([Fault(SlowFuture(), "forward_backward")]))
    before = local.effects()
    process = start(local, f"{block}\n    print('waiting', flush=True)\n    client.forward_backward(BATCH)\n")
    assert process.stdout is not None
    assert process.stdout.readline() == "waiting\n"
    while local.effects() == before:  # then the operation is at the service: now it is really waited for
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, complaints = finish(process)
    assert process.returncode == -signal.SIGINT, complaints
    assert complaints.splitlines()[-1] == "KeyboardInterrupt"
    assert complaints.count("Traceback") == 1


@pytest.mark.parametrize("end", ["", "raise SystemExit(0)", "client.inner.forward_backward(BATCH)"])
def test_a_program_that_ends_without_close_says_nothing_and_does_not_hang(local: ScriptedService, end: str) -> None:
    process = start(local, f"client = open_client()\nprint(client.forward(BATCH, 'cross_entropy').metrics)\n{end}\n")
    said, complaints = finish(process)
    assert complaints == ""
    assert "loss:sum" in said
    assert process.returncode == 0


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork")
def test_a_forked_child_uses_clients_of_its_own(local: ScriptedService) -> None:
    process = start(
        local,
        """
import warnings; warnings.simplefilter("ignore", DeprecationWarning)  # of forking with threads
client = open_client()
first = client.forward_backward(BATCH).metrics["loss:sum"]
child = os.fork()
if not child:
    try:
        client.forward(BATCH, "cross_entropy")
    except errors.ClosedError:
        with open_client() as own:
            assert own.forward(BATCH, "cross_entropy").metrics["loss:sum"] == first
        sys.exit(0)
    os._exit(1)
assert os.waitpid(child, 0)[1] == 0
client.optim_step(types.AdamParams(learning_rate=3e-3))
assert client.forward(BATCH, "cross_entropy").metrics["loss:sum"] < first
client.close()
print("fine", threads_left())
""",
    )
    assert finish(process) == ("fine 0\n", "")
    assert process.returncode == 0
