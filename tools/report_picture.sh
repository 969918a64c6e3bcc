#!/bin/sh
# Take a picture of the top of an audit's report, in Chromium: tools/report_picture.sh AUDIT PNG [HEIGHT]
#
# HEIGHT in pixels ends the picture before the pairs, whose texts do not belong in it.
set -eu
report=$(realpath "$1/report.html") picture=$2 height=${3:-520}
chromium --headless --no-sandbox --disable-gpu --hide-scrollbars --user-data-dir="$(mktemp -d)" \
    --window-size="1280,$height" --screenshot="$picture" "file://$report" 2>/dev/null
