#!/bin/sh
# Install by Helm what the pipeline has packaged, and go back. Image digests are read from package/IMAGE/digest.
#   release.sh upgrade staging|canary|production [HELM'S OPTIONS]   REGISTRY; SIGNER, whose signature is asked for (nobody: none); HOST, the name that it answers to; VALUES, the hospital's own file, if any
#   release.sh revision NAMESPACE                                   the revision that runs; 0 where there is none
#   release.sh back NAMESPACE REVISION                              nothing is done where that revision still runs
set -eu
cd "$(dirname "$0")/../.."
chart=deploy/helm/cxr-pred
digest() { cat "package/cxr-pred-$1/digest"; }
# what runs now, else the new one
kept() { helm get values cxr --namespace "$space" --output json 2> /dev/null | jq -r ".$1.digest // empty" | grep . || digest "$2"; }
# nothing is installed that this delivery did not sign: SIGNER is the identity of its runs. Who asks for no signature has to say so
signed() {
    [ -n "${SIGNER:-}" ] || { echo "SIGNER is not set: whose signature do the images have to carry? SIGNER=nobody installs them unasked." >&2; exit 2; }
    [ "$SIGNER" != nobody ] || { echo "SIGNER=nobody: who signed the images was not asked." >&2; return 0; }
    for file in package/*/digest; do
        image=$REGISTRY/$(basename "$(dirname "$file")")@$(cat "$file")
        cosign verify --certificate-identity "$SIGNER" --certificate-oidc-issuer https://token.actions.githubusercontent.com "$image" > /dev/null || {
            echo "$image is not signed by $SIGNER: it is not installed." >&2
            exit 3
        }
    done
}
revision() { { helm history cxr --namespace "$1" --output json 2> /dev/null || echo '[]'; } | jq -r "[.[] | select($2)] | last | .revision // 0"; }
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
        helm upgrade --install cxr $chart --namespace "$space" --timeout 10m "$@" \
            --set "image.registry=$REGISTRY" --set "gateway.hostname=$HOST" --set "vit.digest=$(digest vit)" --set "watch.digest=$(digest watch)" \
            --set "page.digest=$page" --set "llm.digest=$llm" --set "training.digest=$(digest train)" ;;
    revision) revision "$2" '.status == "deployed"' ;;
    back)
        now=$(revision "$2" true)
        if [ "$now" = "$3" ]; then echo "Revision $3 still runs: nothing to take back."
        elif [ "$3" = 0 ]; then echo "There was nothing before: no revision to go back to."
        else helm rollback cxr "$3" --namespace "$2" --wait --timeout 10m; fi ;;
    *) sed -n '2,5s/^# *//p' "$0" >&2; exit 2 ;;
esac
