"""Section 18: what becomes of a register whose task goes away while it is looked at."""
import json
import os
import sys
import time

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__)))))
import dfly  # noqa: E402


class Forgetful(dfly.Supernode):
    """Forgets the task of the first register just before its client is taken in, as it does when the origin has another file by then."""

    forgotten = None

    def _worth_waiting(self, task, _peer):
        if self.forgotten is None:
            self.forgotten = task
            with self._swarm.lock:
                self._swarm.forget_locked(task)
        return False


def test_a_client_whose_task_is_forgotten_meanwhile_is_taken_into_the_next_one(tmp_path):
    silent = dfly.listen("127.0.0.1", 0)  # an origin that takes connections, and says nothing
    log, rules = dfly.Log(), dfly.DiskRules(0, 0, 0.0, 0, 0)
    cdn = dfly.Cdn(str(tmp_path), log, dfly.TokenBucket(), 5.0, rules, dfly.Turns(4, 4))
    swarm = dfly.Swarm("127.0.0.1", log, dfly.Scheduler(), cdn, 60.0, time.monotonic)
    fence = dfly.Fence()
    supernode = Forgetful(swarm, dfly.Preheats(swarm, fence, log, {}), "127.0.0.1", log, fence, dfly.HostList("127.0.0.0/8"), 4)
    body = {"rawUrl": "http://127.0.0.1:%d/f" % silent.getsockname()[1], "cid": "127.0.0.1-1-1.000", "ip": "127.0.0.1", "path": "/peer/file/f", "port": 0}
    request = dfly.Request("POST", "/peer/registry", {"content-type": "application/json"}, json.dumps(body).encode(), "127.0.0.1", "127.0.0.1")
    try:
        answer = json.loads(b"".join(supernode.register(request).segments).decode())
        task = swarm.tasks[answer["data"]["taskId"]]
        assert answer["code"] == 200 and list(task.peers) == [body["cid"]] and task is not supernode.forgotten
    finally:
        swarm.stop()
        silent.close()
