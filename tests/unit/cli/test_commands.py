"""Options, help and the little things that commands print."""

from __future__ import annotations

import signal
import subprocess
import sys

import pytest

import fwasync
from fwasync.cli import local_service
from fwasync.cli.failures import CommandError
from fwasync.cli.output import print_table, shown


def fwasync_cli(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "fwasync", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=200)


def test_version_and_wrong_usage() -> None:
    assert fwasync_cli("--version").stdout == f"fwasync {fwasync.__version__}\n"
    wrong = fwasync_cli("train", "sft", "--colour", "red")
    assert wrong.returncode == 2
    assert wrong.stderr.startswith("error: --colour: there is no setting 'colour'; ")


@pytest.mark.parametrize(("command", "said"), [((), "demo"), (("train", "sft"), "FWASYNC_API_KEY")])
def test_help_loads_nothing_heavy(command: tuple[str, ...], said: str) -> None:
    code = (
        "import sys\nfrom fwasync.cli import main\nsys.argv = ['fwasync', *sys.argv[1:], '--help']\n"
        "try: main()\nexcept SystemExit: pass\n"
        "print([name for name in ('anyio', 'numpy', 'rich', 'tinker', 'tokenizers', 'torch') if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *command], capture_output=True, text=True, check=True, timeout=200
    )
    assert said in done.stdout
    assert done.stdout.splitlines()[-1] == "[]"


@pytest.mark.skipif(sys.platform == "win32", reason="signals")
def test_ctrl_c_before_the_command_begins() -> None:
    code = (
        "import sys, time\nimport fwasync.cli as cli\n"
        "class Finder:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name == 'fwasync.cli.demo':\n"
        "            print('importing', flush=True)\n"
        "            time.sleep(600)\n"
        "sys.meta_path.insert(0, Finder())\nsys.argv = ['fwasync', 'demo']\ncli.main()\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "importing\n"
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=200)
    assert (process.returncode, err.strip()) == (130, "interrupted")


def test_a_missing_local_service_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = ["numpy>=1", 'no-such-thing>=2; extra == "local"', "other_thing[a]; extra == 'local'", 'x; extra == "dev"']
    monkeypatch.setattr(local_service, "requires", lambda name: wanted)
    with pytest.raises(CommandError) as caught:
        local_service.require_local()
    assert str(caught.value) == "the local service needs no-such-thing, other_thing: pip install 'fwasync[local]'"


def test_the_local_service_of_this_environment_is_complete() -> None:
    local_service.require_local()


def test_tables_and_texts_are_safe_to_print(capsys: pytest.CaptureFixture[str]) -> None:
    print_table(("", "exact"), [("base", "0.0%"), ("after SFT", "10.0%")])
    assert capsys.readouterr().out == "              exact\n  base         0.0%\n  after SFT   10.0%\n"
    assert shown("a\x1b[31m\nb") == "a·[31m·b"
    assert shown("") == "(nothing)"


def test_a_broken_installation_is_one_line_too() -> None:
    code = (
        "import sys\nfrom fwasync.cli import main\nsys.modules['fwasync.cli.demo'] = None\n"
        "sys.argv = ['fwasync', *sys.argv[1:]]\nmain()"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "demo"], capture_output=True, text=True, check=False, timeout=200
    )
    assert done.returncode == 70
    assert done.stderr.startswith("error: this is a bug in fwasync: ModuleNotFoundError")
    assert "Traceback" not in done.stderr
    loud = [sys.executable, "-c", code, "--debug", "demo"]
    assert "Traceback" in subprocess.run(loud, capture_output=True, text=True, check=False, timeout=200).stderr
