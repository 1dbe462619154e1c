"""The hub's data sets in miniature, behind the endpoints from which `datasets` reads them.

Run as a program, for the client reads HF_ENDPOINT when it is imported: it takes a folder to work
in, and what each set holds (JSON: id -> files, and rows of each). It serves them at the commits
that the tasks name and at no other, and writes what `load_examples` made of every task's splits.
"""

import hashlib
import json
import os
import sys
from pathlib import Path

import hub_standin


class Handler(hub_standin.Handler):
    def parts(self):
        """(id, revision, path) of /datasets/ORG/NAME/resolve/REV/PATH and its like in /api."""
        words = self.path.split("?")[0].removeprefix("/api").strip("/").split("/")
        return "/".join(words[1:3]), words[4] if len(words) > 4 else "", "/".join(words[5:])

    def do_GET(self):
        name, revision, path = self.parts()
        files = self.server.repos.get(name)
        if files is None:
            return self.reply(404, X_Error_Code="RepoNotFound")
        if revision != self.server.commits[name]:
            return self.reply(404, X_Error_Code="RevisionNotFound")
        if self.path.startswith("/api"):
            if "/tree/" in self.path:
                folder = path + "/" if path else ""
                listed = [entry(p, data) for p, data in files.items() if p.startswith(folder)]
                return self.reply(200, json.dumps(listed).encode())
            return self.reply(200, {"id": name, "sha": revision, "siblings": []})
        if path not in files:
            return self.reply(404, X_Error_Code="EntryNotFound", X_Repo_Commit=revision)
        etag = f'"{hashlib.sha256(files[path]).hexdigest()}"'
        self.reply(200, files[path], ETag=etag, X_Repo_Commit=revision)

    do_HEAD = do_GET

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"])).decode()
        name, _, _ = self.parts()
        files = self.server.repos[name]
        asked = [p for p in json.loads(body)["paths"] if p in files]
        self.reply(200, json.dumps([entry(p, files[p]) for p in asked]).encode())


def entry(path, data):
    oid = hashlib.sha1(data).hexdigest()
    return {"type": "file", "path": path, "size": len(data), "oid": oid}


def card(paths):
    """A README whose metadata name the configurations and their splits, as that of the hub."""
    lines, configs = ["---", "configs:"], dict.fromkeys(p.split("/")[0] for p in paths)
    for config in configs:
        lines += [f"- config_name: {config}", "  data_files:"]
        for path in paths:
            if path.startswith(config + "/"):
                split = path.split("/")[1].removesuffix(".parquet")
                lines += [f"  - split: {split}", f"    path: {path}"]
    return "\n".join([*lines, "---", ""]).encode()


def main():
    place = Path(sys.argv[1])
    hub = hub_standin.Hub()
    hub.RequestHandlerClass, hub.commits = Handler, {}
    os.environ |= {"HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0", "HF_HOME": str(place / "home")}
    import datasets

    from mezo import tasks

    datasets.disable_progress_bars()
    for name, files in json.load(sys.stdin).items():
        made = {}
        for path, rows in files.items():
            found, own = datasets.Dataset.from_list(rows), place / "file"
            write = found.to_parquet if path.endswith(".parquet") else found.to_json
            write(str(own))
            made[path] = own.read_bytes()
        tabled = [path for path in made if path.endswith(".parquet")]
        hub.repos[name] = made | ({"README.md": card(tabled)} if tabled else {})
    results = {}
    for name, task in tasks.TASKS.items():
        if task.hub is not None:
            hub.commits[task.hub.id] = task.hub.revision
            splits = [split for split in ("train", "dev", "test") if getattr(task.hub, split)]
            examples = {split: tasks.load_examples(task, split) for split in splits}
            results[name] = {s: [[e.label, e.answers] for e in es] for s, es in examples.items()}
    json.dump(results, sys.stdout)


if __name__ == "__main__":
    main()
