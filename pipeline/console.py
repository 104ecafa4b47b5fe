"""The console script `gridcap`: an interrupt is handled before the slow imports begin."""

from pipeline.startup import handle_interrupts


def main() -> None:
    """Run the console script `gridcap`."""
    handle_interrupts()
    from pipeline import cli

    cli.main()
