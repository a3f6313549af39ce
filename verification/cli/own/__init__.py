"""Commands, and options of `mxref gate`, about this project's own sources: judged, timed, recorded."""
