"""The Fireworks control plane, async: trainer jobs, deployments, shapes, models, checkpoints and their promotion.

Inside: the requests of an account (`plane`), what is asked for (`requests`, pure), what a state means (`states`,
pure), the waiting (`waiting`), the public clients (`client`, `trainer_jobs`, `deployments`) and what they answer
(`resources`).
"""
