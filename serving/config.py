"""Settings of the gateway. Loads without torch."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from deploy.config import ErasureSettings, PolicySettings, RolloutSettings
from feedback.config import FeedbackSettings, LimitSettings, Section

KEEP_ALIVE_S = 75
"""How long an unused connection stays open: longer than clients and load balancers keep theirs (httpx 5 s, aiohttp 15 s, nginx and AWS
60 s), because a question sent over one that the server is closing is lost."""


class ServerSettings(Section):
    """`[server]`: where the gateway listens and how much it takes on."""

    host: str = "127.0.0.1"
    """Address to listen on. Anything but loopback needs `feedback.auth`."""
    port: int = Field(default=8000, ge=0, le=65535)
    """Port to listen on; 0 lets the system choose."""
    page: bool = True
    """Serve the chat page at `/`. Whoever can open it may chat and rate through its session, without an API key."""
    allowed_origins: tuple[str, ...] = ()
    """Web origins whose scripts may call the gateway (CORS), e.g. `https://app.example`."""
    max_body_bytes: int = Field(default=256 * 1024, ge=1024)
    """Largest request body, counted while it is read."""
    max_streams: int = Field(default=256, ge=1)
    """Answers in flight at once; one more gets 503 and Retry-After."""
    route_refresh_s: float = Field(default=0.2, gt=0, le=1)
    """How often the routing table is read."""
    route_max_age_s: float = Field(default=1.5, gt=0)
    """With a routing table older than this only stable is served."""


class RecordSettings(Section):
    """`[record]`: what is kept of an answer."""

    recording: Literal["required", "best_effort"] = "required"
    """What happens to a chat that cannot be stored: refused with 503, or answered unrecorded, without a token and flagged."""
    token_ids: bool = False
    """Also keep the ids of the answer's tokens and their logprobs."""


class ComparisonSettings(Section):
    """`[comparison]`: two answers side by side."""

    enabled: bool = True
    """Whether clients may ask for `compare`."""
    page_share: float = Field(default=0.15, ge=0, le=1)
    """How often the chat page asks for a comparison; never twice running."""


class GatewaySettings(Section):
    """All that `serving.app.create_app` reads."""

    server: ServerSettings = ServerSettings()
    record: RecordSettings = RecordSettings()
    comparison: ComparisonSettings = ComparisonSettings()
    policy: PolicySettings
    feedback: FeedbackSettings = FeedbackSettings()
    limits: LimitSettings = LimitSettings()
    erasure: ErasureSettings = ErasureSettings()
    rollout: RolloutSettings = RolloutSettings()
