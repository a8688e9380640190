"""A progress that shows nothing, for calls of the engine from tests."""


class Silent:
    """types.Progress and types.ProgressTask in one: swallows everything."""

    def track(self, what: str, total: int, start: int = 0) -> "Silent":
        return self

    def say(self, message: str) -> None:
        pass

    def advance(self, by: int = 1, **figures: float) -> None:
        pass

    def __enter__(self) -> "Silent":
        return self

    def __exit__(self, *exc: object) -> None:
        pass
