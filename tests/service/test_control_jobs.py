"""Accounts, models, shapes, trainer jobs and their gateways, over HTTP."""

from __future__ import annotations

import httpx
import pytest

from fwasync import AsyncServiceClient, types
from service.control_client import BASE, SHAPE, TOKENS, A, start_control


def test_there_is_one_account(control):
    found = control.get("/v1/accounts", pageSize=2)
    assert [account["name"] for account in found["accounts"]] == ["accounts/local"]
    assert control.get("/v1/accounts/local")["state"] == "READY"


def test_a_bearer_token_opens_it_too_and_a_wrong_key_does_not(control):
    url = control.http.base_url.join("/v1/accounts")
    bearer = {"Authorization": f"Bearer {control.service.key}"}
    assert httpx.get(url, headers=bearer, timeout=100, trust_env=False).status_code == 200
    refused = httpx.get(url, headers={"X-Api-Key": "tml-wrong"}, timeout=100, trust_env=False)
    assert refused.status_code == 401
    assert "key" in refused.json()["error"]["message"]


def test_models_are_listed_and_found(control):
    models = control.get("/v1/accounts/fwasync/models")["models"]
    assert BASE in [model["name"] for model in models]
    found = control.get(f"/v1/{BASE}")
    assert found["state"] == "READY"
    assert found["contextLength"] > 0
    assert int(found["baseModelDetails"]["parameterCount"]) > 0
    refused = control.get("/v1/accounts/fireworks/models/qwen3-8b", 404)
    assert BASE in refused["error"]["message"]


def test_shapes_have_versions(control):
    [version] = control.get(f"/v1/{SHAPE}/versions", filter="latest_validated=true", pageSize=1)[
        "trainingShapeVersions"
    ]
    assert version["name"] == f"{SHAPE}/versions/v1"
    snapshot = version["snapshot"]
    assert (snapshot["baseModel"], snapshot["trainerMode"]) == (BASE, "POLICY_TRAINER")
    assert control.get(f"/v1/{version['name']}") == version
    deployed = control.get(f"/v1/{snapshot['deploymentShapeVersion']}")
    assert deployed["snapshot"]["baseModel"] == BASE
    parent = snapshot["deploymentShapeVersion"].partition("/versions/")[0]
    [listed] = control.get(f"/v1/{parent}/versions", filter="latest_validated=true")["deploymentShapeVersions"]
    assert listed == deployed
    control.get(f"/v1/{SHAPE}/versions/v9", 404)


def test_shapes_are_chosen_by_filter(control):
    everywhere = "/v1/accounts/-/trainingShapes/-/versions"
    wanted = f'snapshot.base_model="{BASE}" AND snapshot.trainer_mode="LORA_TRAINER" AND latest_validated=true'
    found = control.get(everywhere, filter=wanted, orderBy="create_time desc", pageSize=200)["trainingShapeVersions"]
    assert [version["name"] for version in found] == [f"{SHAPE}-lora/versions/v1"]
    assert control.get(everywhere, filter="snapshot.parameter_count>=1e12")["trainingShapeVersions"] == []
    assert "not understood" in control.get(everywhere, 400, filter="what is this")["error"]["message"]


def test_a_job_is_created_shown_and_listed(control):
    made = control.job("shown", trainingShape=SHAPE, body={"displayName": "mine"})
    assert made["name"] == "accounts/local/rlorTrainerJobs/shown"
    assert made["state"] == "JOB_STATE_RUNNING"
    assert made["trainingShape"] == f"{SHAPE}/versions/v1"
    assert made["trainingConfig"]["maxContextLength"] > 0
    assert made["displayName"] == "mine"
    assert control.get(f"{A}/rlorTrainerJobs/shown") == made
    assert made in control.get(f"{A}/rlorTrainerJobs")["rlorTrainerJobs"]
    named = control.get(f"{A}/rlorTrainerJobs", filter='display_name="mine"')
    assert [job["name"] for job in named["rlorTrainerJobs"]] == [made["name"]]


def test_an_id_is_given_once(control):
    first = control.job("once")
    taken = control.job("once", status=409)
    assert "exists already" in taken["error"]["message"]
    assert control.get(f"{A}/rlorTrainerJobs/once") == first
    free = control.post(f"{A}/rlorTrainerJobs", {"trainingConfig": {"baseModel": BASE}})
    assert free["name"] != control.post(f"{A}/rlorTrainerJobs", {"trainingConfig": {"baseModel": BASE}})["name"]


@pytest.mark.parametrize(
    ("body", "query", "what"),
    [
        ({"trainingConfig": {}}, {}, "baseModel"),
        ({"trainingConfig": "x"}, {}, "cannot be read"),
        ({}, {"rlorTrainerJobId": "No Good"}, "rlorTrainerJobId"),
        ({}, {"trainingShape": "accounts/fireworks/trainingShapes/ts"}, "no shape"),
        ({}, {"trainingShape": "accounts/fwasync/trainingShapes/qwen3-small"}, "is for"),
        ({}, {"deploymentId": "nowhere"}, "create it before"),
        ({"hotLoadDeploymentId": "other"}, {"deploymentId": "one"}, "disagree"),
    ],
)
def test_a_bad_job_is_refused(control, body, query, what):
    full = {"trainingConfig": {"baseModel": BASE}, **body}
    refused = control.post(f"{A}/rlorTrainerJobs", full, 400, **query)
    assert what in refused["error"]["message"]


def test_jobs_come_in_pages(begin):
    control = begin()
    for number in range(5):
        control.job(f"job-{number}")
    control.delete(f"{A}/rlorTrainerJobs/job-3")
    names, token = [], ""
    for _ in range(2):
        page = control.get(f"{A}/rlorTrainerJobs", pageSize=2, pageToken=token)
        assert page["totalSize"] == 4
        names += [job["name"].rpartition("/")[2] for job in page["rlorTrainerJobs"]]
        token = page["nextPageToken"]
    assert (names, token) == (["job-4", "job-2", "job-1", "job-0"], "")
    control.get(f"{A}/rlorTrainerJobs", 400, pageToken="?")


def test_an_unknown_base_model_fails_the_job(control):
    made = control.job("lost", base_model="accounts/fireworks/models/qwen3-8b")
    assert made["state"] == "JOB_STATE_FAILED"
    assert "qwen3-8b" in made["status"]["message"]
    assert control.gateway("lost").http.get("/healthz").status_code == 404


def test_a_job_is_cancelled_resumed_and_deleted(control):
    job = f"{A}/rlorTrainerJobs/life"
    control.job("life")
    assert "can be resumed" in control.post(f"{job}:resume", status=400)["error"]["message"]
    assert control.post(f"{job}:cancel")["state"] == "JOB_STATE_CANCELLED"
    assert control.post(f"{job}:cancel")["state"] == "JOB_STATE_CANCELLED"
    assert control.gateway("life").http.get("/healthz").status_code == 404
    assert control.http.post(f"{job}:resume").json()["state"] == "JOB_STATE_RUNNING"
    assert control.gateway("life").http.get("/healthz").json() == {"status": "ok"}
    assert control.delete(job) == control.delete(job) == {}
    assert control.get(job)["state"] == "JOB_STATE_DELETED"
    assert control.post(f"{job}:cancel", status=400)
    assert control.post(f"{job}:resume", status=400)
    control.job("life", status=409)
    control.get(f"{A}/rlorTrainerJobs/never", 404)
    control.delete(f"{A}/rlorTrainerJobs/never", 404)


def test_a_job_trains_through_its_gateway(control):
    control.job("trains")
    gateway = control.gateway("trains")
    model = gateway.model(base_model=BASE)
    assert model.step(1, TOKENS) > 0
    gateway.run("/save_weights", model.body(3, path="step-1"))
    assert gateway.http.get("/list_checkpoints").json() == {"checkpoints": ["step-1"]}
    control.job("other")
    assert control.gateway("other").http.get("/list_checkpoints").json() == {"checkpoints": []}


def test_a_session_belongs_to_its_job(control):
    control.job("mine")
    control.job("theirs")
    mine, theirs = control.gateway("mine"), control.gateway("theirs")
    model = mine.model(base_model=BASE)
    batch = model.batch(None, TOKENS, backward=False)
    for elsewhere in (theirs, control.service):
        assert elsewhere.post("/forward", batch).status_code == 404
        assert elsewhere.post("/get_info", model.body()).status_code == 404
        beat = {"session_id": model.session_id}
        assert elsewhere.post("/session_heartbeat", beat).status_code == 410
    assert mine.post("/get_info", model.body()).status_code == 200
    direct = control.service.model()
    assert mine.post("/get_info", direct.body()).status_code == 404


def test_a_job_trains_its_base_model_only(control):
    control.job("strict")
    gateway = control.gateway("strict")
    body = {"session_id": gateway.session(), "model_seq_id": 0, "base_model": "fwasync/qwen3-small"}
    refused = gateway.post("/create_model", body)
    assert refused.status_code == 400
    assert "strict trains fwasync/qwen3-tiny" in refused.json()["detail"]


def create(gateway, **fields):
    """Ask for a model; the response."""
    return gateway.post(
        "/create_model", {"session_id": gateway.session(), "model_seq_id": 0, "base_model": BASE, **fields}
    )


@pytest.mark.parametrize(
    ("job_rank", "fields", "trains"),
    [
        (4, {"lora_config": {"rank": 8}}, "LoRA adapters of a rank up to 4"),
        (4, {"lora_config": {"rank": 0}}, "LoRA adapters of a rank up to 4"),
        (4, {}, "LoRA adapters of a rank up to 4"),
        (0, {"lora_config": {"rank": 4}}, "all parameters"),
    ],
)
def test_a_job_trains_adapters_of_its_rank_only(control, job_rank, fields, trains):
    job_id = f"rank-{job_rank}-{fields.get('lora_config', {}).get('rank', 'none')}"
    control.job(job_id, lora_rank=job_rank)
    refused = create(control.gateway(job_id), **fields)
    assert refused.status_code == 400
    assert f"{job_id} trains {trains} (trainingConfig.loraRank)" in refused.json()["detail"]


@pytest.mark.parametrize(
    ("job_rank", "fields"),
    [
        (4, {"lora_config": {"rank": 4}}),
        (4, {"lora_config": {"rank": 2}}),
        (4, {"base_only": True}),
        (0, {"lora_config": {"rank": 0}}),
        (0, {}),
        (0, {"base_only": True}),
    ],
)
def test_several_models_share_the_rank_of_a_job(control, job_rank, fields):
    job_id = f"shared-{job_rank}"
    if control.http.get(f"{A}/rlorTrainerJobs/{job_id}").status_code == 404:
        control.job(job_id, lora_rank=job_rank)
    gateway = control.gateway(job_id)
    created = create(gateway, **fields)
    assert created.status_code == 200, created.text
    assert gateway.result(created.json()["request_id"])["model_id"] == created.json()["model_id"]


def test_a_checkpoint_of_another_rank_makes_no_model_of_a_job(control):
    control.job("wide", lora_rank=8)
    control.job("narrow", lora_rank=4)
    wide = control.gateway("wide")
    model = wide.model(base_model=BASE, lora_config={"rank": 8})
    wide.run("/save_weights", model.body(1, path="eight"))
    narrow = control.gateway("narrow")
    body = {"session_id": narrow.session(), "model_seq_id": 0, "path": "cross_job://wide/eight"}
    refused = narrow.post("/load_weights", body)
    assert refused.status_code == 400
    assert "narrow trains LoRA adapters of a rank up to 4" in refused.json()["detail"]
    body["session_id"] = wide.session()
    assert wide.run("/load_weights", body)["type"] == "load_weights"


def test_a_forward_only_job_trains_nothing_and_goes_on(control):
    control.job("reference", lora_rank=0, body={"forwardOnly": True})
    gateway = control.gateway("reference")
    model = gateway.model(base_model=BASE, lora_config={"rank": 0})
    before = model.logprobs(TOKENS)
    for kind, body in (
        ("forward_backward", model.batch(1, TOKENS)),
        ("optim_step", model.body(2, adam_params={})),
    ):
        refused = gateway.post(f"/{kind}", body)
        assert refused.status_code == 400
        assert f"{kind}: trainer job reference is forwardOnly" in refused.json()["detail"]
    # The refused numbers are used up, so that what the client sends next is not kept waiting for them.
    out = gateway.run("/forward", model.batch(3, TOKENS, backward=False))
    assert out["loss_fn_outputs"][0]["logprobs"]["data"] == before


def test_a_job_calls_its_checkpoints_by_their_names(control):
    for job_id in ("first", "second"):
        control.job(job_id)
    first, second = control.gateway("first"), control.gateway("second")
    model = first.model(base_model=BASE)
    assert first.run("/save_weights", model.body(1, path="here"))["path"] == "here"
    model.step(2, TOKENS)
    learned = model.logprobs(TOKENS)
    first.run("/save_weights", model.body(4, path="there"))

    later = first.model(base_model=BASE)
    first.run("/load_weights", later.body(1, path="there", optimizer=True))
    assert later.logprobs(TOKENS) == learned
    # A name of its own comes before one of another model of the job.
    later.step(2, TOKENS)
    own = later.logprobs(TOKENS)
    first.run("/save_weights", later.body(4, path="there"))
    first.run("/load_weights", model.body(5, path="there"))
    assert model.logprobs(TOKENS) == learned
    newest = first.model(base_model=BASE)
    first.run("/load_weights", newest.body(1, path="there"))
    assert newest.logprobs(TOKENS) == own

    elsewhere = second.model(base_model=BASE)
    failed = second.run("/load_weights", elsewhere.body(1, path="there"))
    assert "trainer job 'second' has saved no checkpoint 'there'" in failed["error"]
    second.run("/load_weights", elsewhere.body(2, path="cross_job://first/there"))
    assert elsewhere.logprobs(TOKENS) == own
    for path in ("cross_job://first/nowhere", "cross_job://nobody/there", "cross_job://first"):
        assert "has saved no checkpoint" in second.run("/load_weights", elsewhere.body(path=path))["error"]


def test_a_deleted_job_takes_its_sessions_along(control):
    control.job("brief")
    gateway = control.gateway("brief")
    session_id = gateway.session()
    control.delete(f"{A}/rlorTrainerJobs/brief")
    for path in ("/session_heartbeat", "/create_session"):
        response = gateway.post(path, {"session_id": session_id})
        assert response.status_code == 404
        assert "brief" in response.json()["error"]["message"]
    assert session_id not in control.service.http.get("/sessions", params={"limit": 1000}).json()["sessions"]


def test_unknown_jobs_and_accounts_have_no_gateway(control):
    control.job("known")
    for tail in ("local/unknown", "acme/known"):
        response = control.http.get(f"/training/v1/rlorTrainerJobs/{tail}/api/v1/healthz")
        assert response.status_code == 404
        assert "no trainer runs" in response.json()["error"]["message"]


def test_a_job_that_starts_is_not_reachable_yet(begin):
    control = begin(startup_s=3600)
    assert control.job("slow")["state"] == "JOB_STATE_CREATING"
    assert control.get(f"{A}/rlorTrainerJobs/slow")["state"] == "JOB_STATE_CREATING"
    assert control.gateway("slow").http.get("/healthz").status_code == 503


def test_jobs_survive_a_kill(begin):
    control = begin()
    control.job("kept", body={"displayName": "kept"})
    control.job("gone")
    control.delete(f"{A}/rlorTrainerJobs/gone")
    model = control.gateway("kept").model(base_model=BASE)
    control.gateway("kept").run("/save_weights", model.body(1, path="step-0"))
    before = control.get(f"{A}/rlorTrainerJobs/kept")
    control.service.close()
    again = begin()
    assert again.get(f"{A}/rlorTrainerJobs/kept") == before
    assert again.get(f"{A}/rlorTrainerJobs/gone")["state"] == "JOB_STATE_DELETED"
    gateway = again.gateway("kept")
    assert gateway.http.get("/list_checkpoints").json() == {"checkpoints": ["step-0"]}
    assert gateway.post("/get_info", model.body()).status_code == 404
    resumed = gateway.model(base_model=BASE)
    gateway.run("/load_weights", resumed.body(1, path=f"tinker://{model.id}/weights/step-0", optimizer=True))


def test_what_is_not_there_says_so(control):
    missing = control.get("/v1/accounts/local/datasets", 404)
    assert "nothing at /v1/accounts/local/datasets" in missing["error"]["message"]


def test_scripted_faults_strike_through_a_gateway_too(tmp_path):
    control = start_control(tmp_path, "--faults")
    try:
        control.job("faulty")
        gateway = control.gateway("faulty")
        model = gateway.model(base_model=BASE)
        plan = {
            "faults": [{"action": {"type": "status", "status": 503, "after": True}, "route": "optim_step", "nth": 1}]
        }
        assert control.http.put("/admin/faults", json=plan).status_code == 200
        gateway.run("/forward_backward", model.batch(1, TOKENS))
        body = model.body(2, adam_params={"learning_rate": 1e-2})
        assert gateway.post("/optim_step", body).status_code == 503
        assert gateway.run("/optim_step", body)["metrics"]["grad_norm"] > 0
    finally:
        control.close()
        control.service.close()


async def test_our_client_trains_through_a_gateway(control):
    control.job("ours")
    url = str(control.gateway("ours").http.base_url).removesuffix("/api/v1/")
    targets = [*TOKENS[1:], 0]
    datum = types.Datum(
        model_input=types.ModelInput.from_ints(TOKENS), loss_fn_inputs={"target_tokens": targets, "weights": [1.0] * 4}
    )
    async with AsyncServiceClient(url, control.service.key) as service:
        async with service.create_training_client(BASE, lora_rank=4) as client:
            before = await client.forward_backward([datum], "cross_entropy")
            await client.optim_step(types.AdamParams(learning_rate=1e-2))
            after = await client.forward([datum], "cross_entropy")
    assert after.metrics["loss:sum"] < before.metrics["loss:sum"]
