"""The few endpoints of the Hugging Face hub that push and pull speak to, in a thread.

Run as a program it takes commands of `mezo` (lists of words, as JSON) from stdin and writes what
came of each, and what the hub has at the end: the client reads HF_ENDPOINT when it is imported.
"""

import base64
import hashlib
import io
import json
import os
import sys
import threading
from contextlib import redirect_stderr, redirect_stdout
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

TOKEN, COMMIT = "hf_secret", "1" * 40


class Hub(ThreadingHTTPServer):
    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.repos: dict[str, dict[str, bytes]] = {}  # name -> path -> contents
        self.created: list[dict] = []
        self.url = f"http://127.0.0.1:{self.server_port}"
        threading.Thread(target=self.serve_forever, daemon=True).start()


class Handler(BaseHTTPRequestHandler):
    server: Hub

    def log_message(self, *args):
        pass

    def reply(self, code, body=b"", **headers):
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(code)
        for name, value in (headers | {"Content-Length": len(data)}).items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def do_GET(self):
        parts = self.path.split("?")[0].strip("/").split("/")
        name = "/".join(parts[2:4] if parts[0] == "api" else parts[:2])
        if name == "user/dead":
            return self.connection.close()
        if name == "user/gated":
            return self.reply(403, X_Error_Code="GatedRepo")
        if name not in self.server.repos:
            return self.reply(404, X_Error_Code="RepoNotFound")
        if parts[0] == "api":
            return self.reply(200, {"id": name, "siblings": []})
        data = self.server.repos[name].get(parts[-1])
        if data is None:
            return self.reply(404, X_Error_Code="EntryNotFound", X_Repo_Commit=COMMIT)
        etag = f'"{hashlib.sha256(data).hexdigest()}"'
        self.reply(200, data, ETag=etag, X_Repo_Commit=COMMIT)

    do_HEAD = do_GET

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self.reply(401, {"error": "Invalid credentials"})
        if self.path.endswith("/repos/create"):
            return self.create(json.loads(body))
        if self.path.endswith("/validate-yaml"):
            return self.reply(200, {"errors": [], "warnings": []})
        name = "/".join(self.path.strip("/").split("/")[2:4])
        if "/preupload/" in self.path:
            files = [
                {"path": f["path"], "uploadMode": "regular", "shouldIgnore": False}
                for f in json.loads(body)["files"]
            ]
            return self.reply(200, {"files": files})
        for line in map(json.loads, body.splitlines()):
            if line["key"] == "file":
                data = base64.b64decode(line["value"]["content"])
                self.server.repos[name][line["value"]["path"]] = data
        self.reply(
            200, {"commitUrl": f"{self.server.url}/{name}/commit/{COMMIT}", "commitOid": COMMIT}
        )

    def create(self, asked):
        name = f"{asked['organization']}/{asked['name']}"
        if asked["organization"] == "other":
            return self.reply(403, {"error": "You don't have the rights"})
        if name in self.server.repos:
            return self.reply(409, {"error": "exists", "url": f"{self.server.url}/{name}"})
        self.server.created.append(asked)
        self.server.repos[name] = {}
        self.reply(200, {"url": f"{self.server.url}/{name}"})


def main():
    hub = Hub()
    os.environ |= {"HF_ENDPOINT": hub.url, "HF_TOKEN": TOKEN, "HF_HUB_OFFLINE": "0"}
    from mezo.cli.main import main as mezo

    hub.repos["facebook/opt-1.3b"] = {}
    hub.repos["user/empty"] = {}
    hub.repos["user/noise"] = {"run.mezo": b"\x80\x04cposix\nsystem\n"}
    results = []
    for argv in json.load(sys.stdin):
        if argv == ["down"]:
            hub.shutdown()
            hub.server_close()
            continue
        out, err = io.StringIO(), io.StringIO()
        with redirect_stdout(out), redirect_stderr(err):
            if argv[0] == "python":
                exec(argv[1], {})
                code = 0
            else:
                code = mezo(argv)
        results.append({"code": code, "out": out.getvalue(), "err": err.getvalue()})
    repos = {
        name: {path: data.hex() for path, data in files.items()}
        for name, files in hub.repos.items()
    }
    json.dump({"results": results, "repos": repos, "created": hub.created}, sys.stdout)


if __name__ == "__main__":
    main()
