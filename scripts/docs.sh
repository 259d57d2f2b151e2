#!/usr/bin/env bash
# The pages of docs/ as a site in build/site: scripts/docs.sh [serve]. Makes .env-docs, without torch.
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/environment.sh
folder=$PWD/.env-docs
[ -x "$folder/bin/python" ] || "$(find_python)" -m venv "$folder"
"$folder/bin/python" -m pip install --quiet --disable-pip-version-check -c constraints.txt mkdocs mkdocs-material
[ "${1:-build}" != serve ] || exec "$folder/bin/mkdocs" serve
export NO_MKDOCS_2_WARNING=1
"$folder/bin/mkdocs" build --strict --clean
if grep -rnoE '(src|href)="https?://[^"]+\.(js|css|woff2?|png|svg)"|url\("?https?:' build/site --include='*.html' --include='*.css'; then
    echo "error: the site would fetch these from elsewhere" >&2
    exit 1
fi
echo build/site/index.html
