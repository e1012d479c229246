"""tools/audit.py: pip-audit against a local server that speaks OSV's protocol."""

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar

import pytest

from tools import audit
from tools.image_pins import pinned

VULNERABLE = ("somewhat", "1.0")


class _Osv(BaseHTTPRequestHandler):
    """Knows of one vulnerability."""

    asked: ClassVar[list[str]] = []

    def do_POST(self) -> None:
        query = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        name, version = query["package"]["name"], query["version"]
        self.asked.append(name)
        affected = {
            "package": {"name": name, "ecosystem": "PyPI"},
            "ranges": [{"type": "ECOSYSTEM", "events": [{"introduced": "0"}, {"fixed": "1.2"}]}],
        }
        known = {"id": "PYSEC-0000-1", "summary": "x", "details": "x", "affected": [affected]}
        body = json.dumps({"vulns": [known]} if (name, version) == VULNERABLE else {}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def service() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Osv)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    _Osv.asked.clear()
    yield f"http://127.0.0.1:{server.server_port}/v1/query"
    server.shutdown()


def test_a_vulnerability_is_a_line(service: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    constraints = tmp_path / "constraints.txt"
    constraints.write_text("harmless==2.0\nsomewhat==1.0\n")
    assert audit.main(["--service", service, "--constraints", str(constraints)]) == 1
    assert capsys.readouterr().out.splitlines() == [
        "somewhat 1.0: PYSEC-0000-1, mended in 1.2",
        "2 pinned packages, 1 known vulnerabilities",
    ]


def test_all_that_is_pinned_is_asked_for(service: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert audit.main(["--service", service]) == 0
    assert set(_Osv.asked) == set(pinned(audit.CONSTRAINTS.read_text()))
    assert capsys.readouterr().out == f"{len(_Osv.asked)} pinned packages, 0 known vulnerabilities\n"


def test_without_the_service_nothing_is_claimed(capsys: pytest.CaptureFixture[str]) -> None:
    assert audit.main(["--service", "http://127.0.0.1:9/v1/query"]) == 2
    said = capsys.readouterr().out
    assert said.startswith("not audited: http://127.0.0.1:9/v1/query did not answer (")
    assert "Connection refused" in said


def test_a_file_that_is_not_there_is_not_the_service(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        audit.main(["--constraints", "/nowhere"])
    assert "--constraints /nowhere is no file" in capsys.readouterr().err
