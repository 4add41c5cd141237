"""What can be said about the broker without starting one."""

from __future__ import annotations

import base64
import os

import pytest

from deploy.broker import cluster_id


def test_a_cluster_id_is_never_taken_for_an_option(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "urandom", lambda count: b"\xfb" * count)  # begins with `-` in url-safe base64
    assert base64.urlsafe_b64encode(os.urandom(16)).startswith(b"-")
    assert cluster_id().startswith("A") and len(base64.urlsafe_b64decode(cluster_id() + "==")) == 16
