"""Entry points share one way to start: an error that a user can mend is one sentence on stderr and exit code 2."""

import sys
from collections.abc import Callable

from absl import app, logging

from deltapref_jax.config import ConfigError
from deltapref_jax.workspace import ArtifactError


def run_main(main: Callable[[list[str]], None]) -> None:
    """Parses flags and runs `main`; sentences of the project's errors go to stderr without a traceback."""
    logging.set_verbosity(logging.ERROR)
    try:
        app.run(_sentences(main), flags_parser=_parse)
    except SystemExit:
        raise


def _sentences(main: Callable[[list[str]], None]) -> Callable[[list[str]], None]:
    def wrapped(argv: list[str]) -> None:
        try:
            main(argv)
        except (ConfigError, ArtifactError, FileNotFoundError, ValueError, FloatingPointError) as e:
            if logging.level_debug():
                raise
            sys.exit(_fail(str(e)))
        except KeyboardInterrupt:
            sys.exit(_fail("Stopped. Run the same command to continue; finished shards are kept.", 130))

    return wrapped


def _fail(sentence: str, code: int = 2) -> int:
    print(sentence, file=sys.stderr)
    return code


def _parse(argv: list[str]) -> list[str]:
    """absl's parser, with the config library's tracebacks for unknown fields and missing files turned to sentences."""
    from absl import flags

    try:
        return flags.FLAGS(argv)
    except flags.Error as e:
        sys.exit(_fail(f"{e} Run with --help for the flags."))
    except (AttributeError, KeyError) as e:
        sys.exit(_fail(f"An override names a field that the config does not have: {e}. The fields stand in "
                       "deltapref_jax/config.py."))
    except (FileNotFoundError, IndexError, TypeError, ValueError) as e:
        sys.exit(_fail(f"The config cannot be read: {e}"))
