"""The lab's one error. Imports nothing."""


class LabError(Exception):
    """What failed and why (`message`) and what to do next (`cure`), shown in one line."""

    def __init__(self, message: str, *, cure: str) -> None:
        super().__init__(f"{message}; next: {cure}")
        self.message = message
        self.cure = cure
