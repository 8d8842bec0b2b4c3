"""The hub's folder, push and pull: a server on this machine speaks the hub's protocol, a stub takes uploads."""

from __future__ import annotations

import hashlib
import json
import pickle
import shutil
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch
from safetensors.torch import save_file

import normfree

SMALL = {"num_classes": 3, "widths": (8, 8, 8, 8), "depths": (1, 1, 1, 1)}
COMMIT = "0123456789abcdef0123456789abcdef01234567"


def small(name="nf_resnet50", **overrides):
    torch.manual_seed(0)
    return normfree.create_model(name, **{**SMALL, **overrides})


def same(one, other, but=()):
    states = [{k: v for k, v in m.state_dict().items() if not k.startswith(tuple(but))} for m in (one, other)]
    return states[0].keys() == states[1].keys() and all(torch.equal(v, states[1][k]) for k, v in states[0].items())


@pytest.fixture
def folder(tmp_path):
    return normfree.save_pretrained(small(), tmp_path / "model")


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A server with the repository folder ``org/name``, as huggingface_hub's endpoint."""
    constants = pytest.importorskip("huggingface_hub.constants")
    repository = tmp_path / "repository"
    repository.mkdir()

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_):
            pass

        def reply(self, status, body=b"", **headers):
            self.send_response(status)
            for key, value in {"Content-Length": len(body), "X-Repo-Commit": COMMIT, **headers}.items():
                self.send_header(key.replace("_", "-"), str(value))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        def do_GET(self):
            path = self.path.split("?")[0]
            if path == "/api/models/org/name/revision/main":
                self.reply(200, json.dumps({"id": "org/name", "sha": COMMIT, "siblings": []}).encode())
            elif path == f"/api/models/org/name/tree/{COMMIT}":
                files = [
                    {"type": "file", "path": f.name, "size": f.stat().st_size, "oid": f.name} for f in self.files()
                ]
                self.reply(200, json.dumps(files).encode())
            elif path.startswith(f"/org/name/resolve/{COMMIT}/") and (repository / path.split("/")[-1]).is_file():
                body = (repository / path.split("/")[-1]).read_bytes()
                self.reply(200, body, ETag=f'"{hashlib.sha1(body).hexdigest()}"')
            else:
                self.reply(404, b"{}", X_Error_Code="RepoNotFound", X_Error_Message="Repository not found")

        do_HEAD = do_GET

        def files(self):
            return sorted(repository.iterdir())

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    endpoint = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", endpoint + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    yield repository
    server.shutdown()
    server.server_close()


@pytest.fixture
def uploads(hub, monkeypatch):
    """Uploads land in the server's repository; the list notes what was asked."""
    from huggingface_hub import HfApi

    asked = []

    def create_repo(self, repo_id, **options):
        asked.append(("create_repo", repo_id, options))
        return type("Url", (), {"repo_id": repo_id})

    def upload_folder(self, *, folder_path, **options):
        asked.append(("upload_folder", sorted(f.name for f in folder_path.iterdir()), options))
        for file in folder_path.iterdir():
            shutil.copy(file, hub)
        return f"https://hub/commit/{COMMIT}"

    monkeypatch.setattr(HfApi, "create_repo", create_repo)
    monkeypatch.setattr(HfApi, "file_exists", lambda self, repo_id, name, **_: (hub / name).exists())
    monkeypatch.setattr(HfApi, "upload_folder", upload_folder)
    return asked


@pytest.mark.parametrize("folded", [False, True])
def test_a_folder_rebuilds_the_model(folded, tmp_path):
    model = small(padding="same")
    model = normfree.fold(model) if folded else model.bfloat16()
    folder = normfree.save_pretrained(model, tmp_path / "deep" / "model")
    assert sorted(f.name for f in folder.iterdir()) == ["README.md", "config.json", "model.safetensors"]
    again = normfree.from_pretrained(folder)
    assert not again.training
    assert again.config == json.loads(json.dumps(model.config))
    assert same(again, model)
    assert next(again.parameters()).dtype == next(model.parameters()).dtype


def test_the_card_has_metadata_and_is_kept(folder):
    card = (folder / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: normfree\npipeline_tag: image-classification\n")
    assert "3 classes" in card
    (folder / "README.md").write_text("mine")
    normfree.save_pretrained(small(num_classes=0), folder)
    assert (folder / "README.md").read_text() == "mine"


@pytest.mark.parametrize("name", ["nf_resnet50", "fixup_resnet50"])
def test_overrides_change_the_model_and_keep_the_weights(name, tmp_path):
    model = small(name)
    folder = normfree.save_pretrained(model, tmp_path)
    assert normfree.from_pretrained(folder, drop_rate=0.4, stochdepth_rate=0.3).dropout.p == 0.4
    for classes in (0, 7):
        other = normfree.from_pretrained(folder, num_classes=classes)
        assert other.num_classes == classes
        assert same(other, model, but=["classifier"])
    assert other.classifier.out_features == 7


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"alpha": "big"}, "alpha='big': must be a finite number"),
        ({"width": 2}, "width=2: widths gives the stages' channels"),
        ({"wdith": 2}, "wdith=2: nf_resnet50 has no such override"),
        (
            {"widths": (16, 8, 8, 8)},
            r"widths=\(16, 8, 8, 8\): .* tensors of the weights do not fit .*; leave widths",
        ),
        ({"name": "resnet50"}, "name='resnet50': the weights are of nf_resnet50; leave the name out"),
        ({"map_location": "toaster"}, "map_location='toaster': is no device here .*toaster"),
    ],
)
def test_overrides_that_do_not_fit(overrides, message, folder):
    with pytest.raises(ValueError, match=rf"^{message}") as caught:
        normfree.from_pretrained(folder, **overrides)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / "model.safetensors").rename(f / "pytorch_model.bin"), "any other form are not read"),
        (lambda f: (f / "model.safetensors").write_bytes(b"pickle"), "no sound safetensors file"),
        (lambda f: save_file({"a": torch.zeros(1)}, f / "model.safetensors"), "does not say which model"),
    ],
)
def test_a_damaged_folder_is_refused(damage, message, folder):
    damage(folder)
    with pytest.raises(ValueError, match=rf"^source='[^=]*: .*{message}"):
        normfree.from_pretrained(folder)


@pytest.mark.parametrize("text", [None, "[]", "[" * 100_000, '{"name": "resnet50"}'])
def test_only_the_weights_file_says_what_the_model_is(text, folder):
    """As after a save that was cut off between its two files."""
    (folder / "config.json").unlink() if text is None else (folder / "config.json").write_text(text)
    assert same(normfree.from_pretrained(folder), small())


def test_a_file_is_no_folder(folder):
    with pytest.raises(ValueError, match=r"^source='.*model\.safetensors': is a file.*normfree\.load$"):
        normfree.from_pretrained(folder / "model.safetensors")


def test_a_full_disk_is_not_told_as_the_hubs_error(uploads, monkeypatch):
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match=r"could not be written: disk full: '.*model.safetensors'$"):
        normfree.push_to_hub(small(), "org/name")
    assert uploads == []


def test_a_file_in_the_folders_place_and_a_foreign_model_are_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"^folder='.*is a file; give a folder"):
        normfree.save_pretrained(small(), tmp_path / "file")
    with pytest.raises(ValueError, match="create_model"):
        normfree.save_pretrained(torch.nn.Linear(1, 1), tmp_path / "other")


def test_push_and_pull(uploads, hub):
    model = small()
    assert normfree.push_to_hub(model, "org/name", private=True).endswith(COMMIT)
    create, upload = uploads
    assert create == ("create_repo", "org/name", {"private": True, "exist_ok": True})
    assert upload[1] == ["README.md", "config.json", "model.safetensors"]
    assert 'normfree.from_pretrained("org/name")' in (hub / "README.md").read_text()
    pulled = normfree.from_pretrained("org/name")
    assert same(pulled, model)
    assert same(normfree.from_pretrained("org/name", local_files_only=True, num_classes=3), model)


def test_a_card_on_the_hub_is_kept_unless_fields_are_given(uploads, hub):
    (hub / "README.md").write_text("theirs")
    normfree.push_to_hub(small(), "org/name")
    assert (hub / "README.md").read_text() == "theirs"
    normfree.push_to_hub(small(), "org/name", model_card_kwargs={"license": "apache-2.0"}, create_pr=True)
    assert "license: apache-2.0" in (hub / "README.md").read_text()
    assert uploads[-1][2]["create_pr"] is True


def test_the_mixin_pushes_and_pulls_the_same_files(uploads, hub, tmp_path):
    from huggingface_hub import PyTorchModelHubMixin

    wrapped = normfree.HubModel(small())
    assert isinstance(wrapped, PyTorchModelHubMixin)
    wrapped.save_pretrained(tmp_path / "m", push_to_hub=True, repo_id="org/name")
    assert sorted(f.name for f in (tmp_path / "m").iterdir()) == sorted(f.name for f in hub.iterdir())
    again = normfree.HubModel.from_pretrained("org/name")
    assert same(again.model, wrapped.model)
    x = torch.randn(1, 3, 32, 32)
    torch.testing.assert_close(again(x), wrapped.eval()(x))
    assert same(pickle.loads(pickle.dumps(again)).model, again.model)
    assert same(normfree.from_pretrained(tmp_path / "m"), wrapped.model)
    assert same(normfree.HubModel.from_pretrained(tmp_path / "m", num_classes=3).model, wrapped.model)
    with pytest.raises(ValueError, match=r"^model='Linear': was not built"):
        normfree.HubModel(torch.nn.Linear(1, 1))


def test_what_the_hub_refuses_is_one_line(hub, monkeypatch):
    from huggingface_hub import constants

    for source in ("org/other", "not a name", "a/b/c"):
        with pytest.raises(ValueError, match=f"^source='{source}': no folder of that name, and as a repository: ") as e:
            normfree.from_pretrained(source)
        assert "\n" not in str(e.value)
    with pytest.raises(ValueError, match=r"^repo_id='org/name': "):
        normfree.push_to_hub(small(), "org/name", token="none")
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:1")
    with pytest.raises(ValueError, match=r"^repo_id='org/name': "):
        normfree.push_to_hub(small(), "org/name", token="none")
    with pytest.raises(ValueError, match=r"^source='org/name': "):
        normfree.from_pretrained("org/name")


def test_without_huggingface_hub(monkeypatch, folder):
    for name in [*sys.modules, "huggingface_hub"]:
        if name.split(".")[0] == "huggingface_hub":
            monkeypatch.setitem(sys.modules, name, None)
    assert normfree.from_pretrained(folder).num_classes == 3
    for use in (lambda: normfree.from_pretrained("a/b"), lambda: normfree.push_to_hub(small(), "a/b")):
        with pytest.raises(ImportError, match="huggingface_hub, which is not installed; pip install"):
            use()
    with pytest.raises(AttributeError, match="no attribute 'Hub'"):
        _ = normfree.Hub
