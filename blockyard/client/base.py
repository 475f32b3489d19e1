"""What the two clients have in common beside the messages."""

from __future__ import annotations

_LOOPBACK = ("127.", "localhost:", "[::1]:")


def channel_options(address: str) -> list[tuple[str, int]]:
    """Answers of any size; and no $http_proxy on the way to a server on this machine."""
    options = [("grpc.max_receive_message_length", -1)]
    if address.startswith(_LOOPBACK):
        options.append(("grpc.enable_http_proxy", 0))
    return options


class ClientBase:
    """The client's own timeout."""

    def __init__(self, timeout: float | None) -> None:
        """`timeout` holds for each call that gives none [s]; None: no limit."""
        self._timeout = timeout

    def _limit(self, timeout: float | None) -> float | None:
        """The timeout of a call that was given this one [s]."""
        return self._timeout if timeout is None else timeout
