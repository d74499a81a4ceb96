"""A headless Chromium that tests drive by its debugging pipe."""

import json
import os
import select
import shutil
import subprocess
import sys

FOUND = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)

PATIENCE = 60.0  # seconds that it may be silent

AS_3_AND_4 = (  # where the browser looks for its pipe
    "import os, sys; first, second = (os.dup2(int(fd), 100 + i) for i, fd in enumerate(sys.argv[1:3])); "
    "os.dup2(first, 3), os.dup2(second, 4), os.execv(sys.argv[3], sys.argv[3:])"
)


class Chromium:
    """One page; used as a context."""

    def __init__(self, folder):
        """``folder``: where its profile goes, and what it downloads."""
        self.profile, self.downloads = folder / "profile", folder / "downloads"
        self.count = 0

    def __enter__(self):
        reads, self.writes = os.pipe()
        answers, writes = os.pipe()
        options = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-dev-shm-usage"]
        command = [FOUND, *options, f"--user-data-dir={self.profile}", "--remote-debugging-pipe", "about:blank"]
        self.process = subprocess.Popen(
            [sys.executable, "-S", "-c", AS_3_AND_4, str(reads), str(writes), *command],
            pass_fds=(reads, writes),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(reads)
        os.close(writes)
        self.answers = os.fdopen(answers, "rb", buffering=0)
        self.waiting, self.events, self.session = b"", [], None
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        self.call("Page.enable")
        self.call("Log.enable")
        self.call("Browser.setDownloadBehavior", behavior="allow", downloadPath=str(self.downloads), eventsEnabled=True)
        return self

    def __exit__(self, *error):
        self.process.kill()
        self.process.wait()
        self.answers.close()
        os.close(self.writes)

    def call(self, method, **parameters):
        """The result of a command of the DevTools protocol."""
        self.count += 1
        message = {"id": self.count, "method": method, "params": parameters}
        if self.session is not None and not method.startswith(("Target.", "Browser.")):
            message["sessionId"] = self.session
        os.write(self.writes, json.dumps(message).encode() + b"\0")
        while (found := self._next()).get("id") != self.count:
            self.events.append(found)
        assert "error" not in found, found
        return found["result"]

    def wait(self, method, **wanted):
        """The next event of this name whose fields are as wanted."""
        while True:
            found = self.events.pop(0) if self.events else self._next()
            if found.get("method") == method and wanted.items() <= found["params"].items():
                return found["params"]

    def _next(self):
        while b"\0" not in self.waiting:
            assert select.select([self.answers], [], [], PATIENCE)[0], "the browser does not answer"
            some = self.answers.read(1 << 16)
            assert some, "the browser ended"
            self.waiting += some
        message, _, self.waiting = self.waiting.partition(b"\0")
        return json.loads(message)

    def open(self, path):
        self.call("Page.navigate", url=path.as_uri())
        self.wait("Page.loadEventFired")

    def reload(self):
        self.call("Page.reload")
        self.wait("Page.loadEventFired")

    def tell(self, expression):
        """The value of an expression in the page."""
        found = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def click(self, name):
        self.tell(f"document.getElementById({name!r}).click()")

    def press(self, key):
        for kind in ("keyDown", "keyUp"):
            self.call("Input.dispatchKeyEvent", type=kind, key=key)
