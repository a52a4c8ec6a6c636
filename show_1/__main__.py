"""`python -m show_1 PROMPT` makes a video; `doctor` says whether it could, `replay` makes one again."""

import signal
import sys

from show_1 import hosts, versions


def main() -> int:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that what is half written is removed
    versions.require()
    hosts.prepare()
    from show_1 import errors

    errors.tell_plainly()
    # Imported only now: where a package is too old the import would fail, and the doctor answers before torch is up.
    if sys.argv[1:2] == ["doctor"]:
        from show_1 import doctor

        return doctor.main(sys.argv[2:])
    if sys.argv[1:2] == ["replay"]:
        from show_1 import replay

        return replay.main(sys.argv[2:])
    from show_1 import command_line

    return command_line.main(sys.argv[1:])


if __name__ == "__main__":
    sys.exit(main())
