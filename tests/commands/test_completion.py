"""Completion in a shell: commands, recipes, options and their choices, and nothing else."""

import ast
import contextlib
import os
import pty
import re
import shutil
import subprocess
from typing import get_args

import pytest

from normfree.cli import Shell, main
from normfree.commands import COMMANDS

SHELLS = get_args(Shell)

ASKED = {
    "normfree ": {"-h", "--help", *COMMANDS},
    "normfree tr": {"train"},
    "normfree train ": {
        *("-h", "--help", "--config", "digits", "cifar", "resnet_imagenet", "nf_resnet_imagenet"),
        *("nf_regnet_imagenet", "nfnet_imagenet"),
    },
    "normfree train cifar --data.h": {"--data.holdout", "--data.holdout-seed"},
    "normfree train cifar --config f.yaml --precision ": {"auto", "bf16", "fp32"},
    "normfree train cifar --log ": {"tensorboard", "wandb", "mlflow"},
    "normfree evaluate runs/x --sp": {"--split"},
    "normfree nowhere --sp": set(),
    "normfree spp none-such": set(),
}

FILES = {
    "normfree spp myn": "mynet.py",
    "normfree evaluate ru": "runs/",
    "normfree export runs/di": "runs/digits/",
    "normfree train cifar --config pe": "pets.yaml",
    "normfree convert mynet.py:net --weights my\\ w": "my\\ weights.pth",
    "normfree predict 'my w": "my\\ weights.pth",
}
"""What is typed, and what its last word is then."""

CALL = """
source "$1"
[[ $(complete -p normfree) == *"-F _tyro_normfree "* ]] || exit 1
shift
for line; do
    read -ra COMP_WORDS <<< "$line"
    [[ $line == *" " ]] && COMP_WORDS+=("")
    COMP_CWORD=$((${#COMP_WORDS[@]} - 1)); COMPREPLY=()
    _tyro_normfree normfree "${COMP_WORDS[COMP_CWORD]}" "${COMP_WORDS[COMP_CWORD-1]}"
    printf '%s|' "${COMPREPLY[@]}"; printf '\\n'
done
"""


@pytest.fixture(scope="module")
def scripts():
    """What is printed for each shell."""
    import io

    printed = {}
    for shell in SHELLS:
        with contextlib.redirect_stdout(io.StringIO()) as told, pytest.raises(SystemExit) as end:
            main(["--tyro-print-completion", shell])
        assert end.value.code == 0
        printed[shell] = told.getvalue()
    return printed


@pytest.mark.skipif(shutil.which("bash") is None, reason="no bash")
def test_bash_completes(scripts, tmp_path):
    (tmp_path / "script").write_text(scripts["bash"])
    words = ["bash", "-c", CALL, "bash", str(tmp_path / "script"), *ASKED]
    run = subprocess.run(words, capture_output=True, text=True, check=True)
    lines = run.stdout.splitlines()
    assert len(lines) == len(ASKED)
    for line, (asked, expected) in zip(lines, ASKED.items(), strict=True):
        assert {word for word in line.split("|") if word} == expected, asked


@pytest.mark.skipif(shutil.which("bash") is None, reason="no bash")
@pytest.mark.parametrize("typed", FILES)
def test_bash_completes_files(typed, scripts, tmp_path):
    """In a real shell, at a terminal, with the key."""
    (tmp_path / "script").write_text(scripts["bash"])
    home = tmp_path / "home"
    (home / "runs" / "digits").mkdir(parents=True)
    for name in ("mynet.py", "pets.yaml", "my weights.pth"):
        (home / name).touch()
    shell, terminal = pty.fork()
    if not shell:
        os.chdir(home)
        os.execvp("bash", ["bash", "--norc", "--noprofile", "-i"])
    try:
        setup = f"bind 'set bell-style none'; normfree() {{ printf '<%q>' \"$@\"; echo; }}; source {tmp_path}/script\n"
        os.write(terminal, setup.encode())
        os.write(terminal, f"{typed}\t\nexit\n".encode())
        told = b""
        with contextlib.suppress(OSError):  # of a terminal whose shell has ended
            while chunk := os.read(terminal, 4096):
                told += chunk
    finally:
        os.close(terminal)
        os.waitpid(shell, 0)
    words = re.findall(r"<([^<>\r\n]+)>", told.decode())
    assert words[-1] == FILES[typed], told.decode()


@pytest.mark.parametrize("shell", SHELLS)
def test_every_script_asks_for_files_where_nothing_else_fits(shell, scripts):
    assert (
        len(re.findall(r"if not completions and .*\n +completions = \['__TYRO_COMPLETE_FILES__'\]", scripts[shell]))
        == 1
    )


@pytest.mark.parametrize("shell", SHELLS)
def test_every_option_is_one_line(shell, scripts):
    """Candidates are told apart by lines."""
    (line,) = re.findall(r"^.*COMPLETION_SPEC = (\{.*\})$", scripts[shell], re.M)
    if shell == "fish":  # where it lies in a string
        line = line.replace('\\"', '"').replace("\\$", "$").replace("\\\\", "\\")
    spec = ast.literal_eval(line)
    options, commands = 0, [spec]
    while commands:
        command = commands.pop()
        commands += command["subcommands"].values()
        for option in command["options"]:
            options += 1
            assert not re.search(r"[\n\t]", option["description"]), option
    assert options > 300


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--tyro-print-completion", "tcsh"], "--tyro-print-completion='tcsh': unknown choice; choose one of 'bash', "),
        (
            ["--tyro-print-completion"],
            "--tyro-print-completion='': unknown choice; choose one of 'bash', 'zsh', 'fish'",
        ),
        (
            ["--tyro-write-completion", "bash", "x"],
            "there is no option '--tyro-write-completion'; write what --tyro-pri",
        ),
    ],
)
def test_another_shell_is_refused(words, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(words) == 2
    assert capsys.readouterr().err.startswith(f"normfree: {message}")
    assert not list(tmp_path.iterdir())
