"""A plain client of the local service's control plane."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import httpx

from service.conftest import Model, Service

A = "/v1/accounts/local"
BASE = "accounts/fwasync/models/qwen3-tiny"
SHAPE = "accounts/fwasync/trainingShapes/qwen3-tiny"
TOKENS = [5, 6, 7, 8]


class Gateway(Service):
    """The trainer API of one job: what `Service` is for the whole process."""

    def __init__(self, service: Service, job_id: str) -> None:
        self.data_dir = service.data_dir
        root = str(service.http.base_url).removesuffix("/api/v1/")
        self.http = httpx.Client(
            base_url=f"{root}/training/v1/rlorTrainerJobs/local/{job_id}/api/v1",
            headers={"X-API-Key": service.key},
            timeout=100,
            trust_env=False,
        )

    def close(self) -> int:
        self.http.close()
        return 0


class Control:
    """Requests to the control plane of a process."""

    def __init__(self, service: Service) -> None:
        self.service = service
        root = str(service.http.base_url).removesuffix("/api/v1/")
        self.http = httpx.Client(base_url=root, headers={"X-Api-Key": service.key}, timeout=100, trust_env=False)
        self.gateways: list[Gateway] = []

    def get(self, path: str, status: int = 200, **query: Any) -> Any:
        return self._checked(self.http.get(path, params=query), status)

    def post(self, path: str, body: object = None, status: int = 200, **query: Any) -> Any:
        return self._checked(self.http.post(path, json=body, params=query), status)

    def patch(self, path: str, body: object, status: int = 200, **query: Any) -> Any:
        return self._checked(self.http.patch(path, json=body, params=query), status)

    def delete(self, path: str, status: int = 200, **query: Any) -> Any:
        return self._checked(self.http.delete(path, params=query), status)

    @staticmethod
    def _checked(response: httpx.Response, status: int) -> Any:
        assert response.status_code == status, response.text
        return response.json()

    def job(
        self,
        job_id: str,
        *,
        base_model: str = BASE,
        lora_rank: int = 4,
        body: Any = None,
        status: int = 200,
        **query: Any,
    ) -> Any:
        config = {"baseModel": base_model, "loraRank": lora_rank, "learningRate": 1e-5}
        full = {"serviceMode": True, "keepAlive": False, "dataset": "", "trainingConfig": config, **(body or {})}
        return self.post(f"{A}/rlorTrainerJobs", full, status, rlorTrainerJobId=job_id, **query)

    def gateway(self, job_id: str) -> Gateway:
        self.gateways.append(Gateway(self.service, job_id))
        return self.gateways[-1]

    def trained(self, job_id: str) -> Model:
        """A model of a job that has taken one step."""
        model = self.gateway(job_id).model(base_model=BASE)
        model.step(1, TOKENS)
        return model

    def close(self) -> None:
        self.http.close()
        for gateway in self.gateways:
            gateway.close()


def start_control(data_dir: Path, *options: str, startup_s: float = 0, hot_load_s: float = 0) -> Control:
    """A process whose jobs, deployments and hot-loads take so long."""
    times = ["--startup-s", str(startup_s), "--hot-load-s", str(hot_load_s)]
    return Control(Service(data_dir, *times, *options))
