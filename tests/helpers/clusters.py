"""The variables by which a scheduler tells a process its place among others. Nothing here loads TensorFlow."""

import json


def vertex(cluster: object, kind: str, index: int = 0, **more: str) -> dict[str, str]:
    """What Vertex AI sets: the pools with their addresses, this process's pool and index, and more of its task."""
    task = {"type": kind, "index": index, **more}
    return {"CLUSTER_SPEC": json.dumps({"cluster": cluster, "task": task, "environment": "cloud"})}
