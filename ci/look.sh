#!/usr/bin/env bash
# Look at a report in headless Chromium. Usage: ci/look.sh REPORT.html [OUT]
# Writes wide.png, phone.png, dark.png and print.pdf; fails on a console error, on a request that would leave the page
# (any, as Chromium is started without a way out), or on a page that is wider than a phone of 390 px.
set -euo pipefail
report=$(realpath "${1:?usage: ci/look.sh REPORT.html [OUT]}")
out=${2:-$(dirname "$report")/look}
chromium=$(command -v chromium || command -v chromium-browser || command -v google-chrome) || {
    echo "ci/look.sh: no chromium here; install it, such as with apt-get install chromium" >&2
    exit 2
}
mkdir -p "$out"
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
look() {
    timeout 90 "$chromium" --headless --no-sandbox --disable-gpu --disable-quic --no-first-run --hide-scrollbars \
        --disable-background-networking --disable-component-update --disable-sync --user-data-dir="$work/profile" \
        --proxy-server=127.0.0.1:9 --enable-logging=stderr --v=0 --virtual-time-budget=3000 "$@" 2>>"$work/log"
}
look --window-size=1280,"${HEIGHT:-2400}" --screenshot="$out/wide.png" "file://$report"
look --blink-settings=preferredColorScheme=0 --window-size=1280,"${HEIGHT:-2400}" --screenshot="$out/dark.png" "file://$report"
look --no-pdf-header-footer --print-to-pdf="$out/print.pdf" "file://$report"
# A window cannot be as narrow as a phone, a frame can: it tells the width that its content needs.
cat >"$work/phone.html" <<HTML
<!DOCTYPE html><meta charset="utf-8"><style>body{margin:0}iframe{border:0;width:390px;height:${HEIGHT:-2400}px}</style>
<iframe src="file://$report"></iframe>
<script>onload = () => { const d = frames[0].document.documentElement; document.title = "needs " + d.scrollWidth; }</script>
HTML
look --allow-file-access-from-files --window-size=500,"${HEIGHT:-2400}" --screenshot="$out/phone.png" "file://$work/phone.html"
look --allow-file-access-from-files --window-size=500,2400 --dump-dom "file://$work/phone.html" >"$work/dom"
width=$(sed -n 's/.*<title>needs \([0-9]*\)<.*/\1/p' "$work/dom")
failed=0
if grep -E 'CONSOLE' "$work/log" >&2; then
    echo "ci/look.sh: the console has messages" >&2
    failed=1
fi
if [ "${width:-9999}" -gt 390 ]; then
    echo "ci/look.sh: the page needs ${width:-an unknown number of} px, expected at most 390" >&2
    failed=1
fi
[ $failed = 1 ] || echo "no console message, ${width} px wide on a phone; pictures in $out"
exit $failed
