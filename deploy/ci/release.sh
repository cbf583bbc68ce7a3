#!/bin/sh
# Install by Helm what the pipeline has packaged, and go back. Image digests are read from package/IMAGE/digest.
#   release.sh upgrade staging|canary|production [HELM'S OPTIONS]   REGISTRY; SIGNER, whose signature is asked for (nobody: none); HOST, the name that it answers to; VALUES, the hospital's own file, if any
#   release.sh revision NAMESPACE                                   the revision that runs; 0 where there is none
#   release.sh still NAMESPACE REVISION                             exit 4 where another revision runs by now
#   release.sh back NAMESPACE REVISION                              nothing is done where that revision still runs
#   release.sh rollback production|staging [REVISION]               to the version that ran before this one, all films at once; or to that revision
set -eu
cd "$(dirname "$0")/../.."
chart=deploy/helm/cxr-pred
digest() { cat "package/cxr-pred-$1/digest"; }
# what runs now, else the new one
kept() { helm get values cxr --namespace "$space" --output json 2> /dev/null | jq -r ".$1.digest // empty" | grep . || digest "$2"; }
# nothing is installed that this delivery did not sign: SIGNER is the identity of its runs. Who asks for no signature has to say so
signed() {
    [ -n "${SIGNER:-}" ] || { echo "SIGNER is not set: whose signature do the images have to carry? SIGNER=nobody installs them unasked." >&2; exit 2; }
    [ "$SIGNER" != nobody ] || { echo "SIGNER=nobody: who signed images and bundle was not asked." >&2; return 0; }
    for image in vit page watch llm-cuda train; do
        [ -s "package/cxr-pred-$image/digest" ] || { echo "package/cxr-pred-$image/digest is missing: which image would be installed is not known." >&2; exit 3; }
    done
    for file in package/*/digest; do
        image=$REGISTRY/$(basename "$(dirname "$file")")@$(cat "$file")
        cosign verify --certificate-identity "$SIGNER" --certificate-oidc-issuer https://token.actions.githubusercontent.com "$image" > /dev/null || {
            echo "$image is not signed by $SIGNER: it is not installed." >&2
            exit 3
        }
    done
    # the bundle in the images is this commit's; its manifest names every file with its hash
    cosign verify-blob --certificate-identity "$SIGNER" --certificate-oidc-issuer https://token.actions.githubusercontent.com \
        --bundle package/bundle/manifest.sigstore.json models/release/manifest.json > /dev/null || {
        echo "models/release/manifest.json is not signed by $SIGNER: its bundle is not installed." >&2
        exit 3
    }
}
revision() { { helm history cxr --namespace "$1" --output json 2> /dev/null || echo '[]'; } | jq -r "[.[] | select($2)] | last | .revision // 0"; }
# whose values a revision has, and which version it is: its digests, or its tag where there are none
of() {
    values=$(helm get values cxr --namespace "$space" --revision "$1" --output json) || return 1
    printf '%s\n' "$values" | jq -r '(.environment // "none") + " " + ([.image.tag, .vit.digest, .page.digest, .watch.digest, .llm.digest] | map(. // "") | join(","))'
}
# A delivery makes two revisions, canary and production, of one version: 'the one before' would change nothing. So: the newest version that this
# environment had before it had the running one for the first time. Who goes back twice goes further back, not forward to what was left.
earlier() {
    running=$(of "$now"); found=0
    for past in $(helm history cxr --namespace "$space" --output json | jq -r ".[] | select(.status == \"superseded\" and .revision < $now) | .revision"); do
        version=$(of "$past")
        [ "${version%% *}" = "$environment" ] || continue
        [ "${version#* }" != "${running#* }" ] || break
        found=$past
    done
    echo "$found"
}
case ${1:-} in
    upgrade)
        environment=$2; shift 2
        signed
        space=cxr page=$(digest page) llm=$(digest llm-cuda)
        case $environment in
            staging) space=cxr-staging; set -- --values $chart/values-staging.yaml "$@" ;;
            # vit is the canary and watch looks at it; page and llm have no share to give, and stay as they are until production
            canary) page=$(kept page page) llm=$(kept llm llm-cuda); set -- --values $chart/values-production.yaml --values $chart/values-canary.yaml "$@" ;;
            production) set -- --values $chart/values-production.yaml "$@" ;;
            *) echo "release.sh upgrade staging|canary|production" >&2; exit 2 ;;
        esac
        [ -z "${VALUES:-}" ] || set -- "$@" --values "$VALUES"
        # the load test comes from one address, whatever the hospital allows one
        [ "$environment" != staging ] || set -- "$@" --set-string service.env.CXR_FILMS_PER_MINUTE=100000
        # Helm remembers ten revisions by itself, which five deliveries use up
        helm upgrade --install cxr $chart --namespace "$space" --history-max 50 --timeout 10m "$@" \
            --set "image.registry=$REGISTRY" --set "gateway.hostname=$HOST" --set "vit.digest=$(digest vit)" --set "watch.digest=$(digest watch)" \
            --set "page.digest=$page" --set "llm.digest=$llm" --set "training.digest=$(digest train)" ;;
    revision) revision "$2" '.status == "deployed"' ;;
    still)
        now=$(revision "$2" '.status == "deployed"')
        [ "$now" = "$3" ] || { echo "Revision $now runs in $2, not $3: somebody went back, or installed another. This delivery ends here." >&2; exit 4; } ;;
    back)
        now=$(revision "$2" true)
        if [ "$now" = "$3" ]; then echo "Revision $3 still runs: nothing to take back."
        elif [ "$3" = 0 ]; then echo "There was nothing before: no revision to go back to."
        else helm rollback cxr "$3" --namespace "$2" --wait --timeout 10m; fi ;;
    rollback)
        environment=$2 to=${3:-0}
        case $environment in production) space=cxr ;; staging) space=cxr-staging ;; *) echo "release.sh rollback production|staging [REVISION]" >&2; exit 2 ;; esac
        case $to in *[!0-9]*) echo "A revision is a number, not $to." >&2; exit 2 ;; esac
        now=$(revision "$space" '.status == "deployed"')
        [ "$now" != 0 ] || { echo "Nothing runs in $space that could go back." >&2; exit 1; }
        [ "$to" != 0 ] || to=$(earlier)
        [ "$to" != 0 ] || { echo "Helm remembers no earlier version of $environment than revision $now: name a revision (helm history cxr --namespace $space)." >&2; exit 1; }
        echo "From revision $now to $to: $(of "$to")"
        helm rollback cxr "$to" --namespace "$space" --wait --timeout 10m
        # Helm waits for no Rollout. One that is older than its window, or that was a canary, would halt at its share of the films
        if helm get manifest cxr --namespace "$space" | grep -q '^kind: Rollout$'; then
            for step in wait promote finish; do WAIT_MINUTES=${WAIT_MINUTES:-15} deploy/ci/rollout.sh "$step" "$space"; done
        fi ;;
    *) sed -n '2,7s/^# *//p' "$0" >&2; exit 2 ;;
esac
