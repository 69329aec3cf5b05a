"""Runs the checks of the SDK for Node against a pod, as one of the checks."""

import os
import subprocess
import unittest

from pod import CREDENTIAL, SHORT_MS, Pod


class Node(unittest.TestCase):
    def test_the_sdk_for_node(self):
        pod = Pod(os.environ["QUOTUM"])
        self.addCleanup(pod.end)
        addresses = {"PROXY": pod.proxy, "ADMIN": pod.admin, "STUB": pod.stub}
        environment = os.environ | addresses | {"CREDENTIAL": CREDENTIAL, "SHORT_MS": str(SHORT_MS)}
        command = ["node", "--test", "--test-reporter=spec", os.path.join(os.environ["NODE_CHECKS"], "openai.test.mjs")]
        self.assertEqual(subprocess.run(command, env=environment, timeout=120).returncode, 0)


if __name__ == "__main__":
    unittest.main(verbosity=2)
