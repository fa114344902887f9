"""A project folder with the scripts of launch/slurm, and programs that stand in for Slurm's."""

from __future__ import annotations

import subprocess
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SECRET = "planted-77d0"
"""Value of WANDB_API_KEY in the environment that all scripts get."""

# Notes how it is called, then does what the next line of `plan` says: STATUS STEP [LEFT].
SRUN = """#!/bin/bash
printf '%s\\n' "$@" >srun.called
env >srun.environment
read -r status step left <plan
sed -i 1d plan
[[ $step == - ]] || { mkdir -p run/checkpoints; echo "step-$step" >run/checkpoints/latest; }
[[ -z $left ]] || echo "$left" >"$VLSCALE_STATUS"
exit "$status"
"""
# Fails as often as there are lines in `away`, as does a controller that is restarting.
SCONTROL = """#!/bin/bash
[[ "$*" == "show hostnames n[1-2]" ]] && { printf 'n1\\nn2\\n'; exit 0; }
[[ ! -s away ]] || { sed -i 1d away; echo "Unable to contact slurm controller" >&2; exit 1; }
case "$*" in
"--oneliner show job 4107" | "--oneliner show job 4099_3")
    echo "JobId=4107 JobState=$(cat state) Requeue=1 BatchFlag=$(cat batch) Reboot=0" ;;
"requeue 4107" | "requeue 4099_3")
    [[ ! -f refuse ]] || { echo "Requested operation is presently disabled" >&2; exit 1; }
    echo "requeued $2" >>requeued ;;
*) echo "scontrol $*" >&2; exit 3 ;;
esac
"""
# Lists the jobs in `queue`.
SQUEUE = """#!/bin/bash
[[ "$*" == "--noheader --jobs="* ]] || exit 3
grep -x "${2#--jobs=}" queue
"""
# As `sbatch --verbose --test-only` answers: what is in `answer`, and status 1 if that is there.
SBATCH = """#!/bin/bash
[[ "$*" == *--test-only* ]] || { echo "$@" >submitted; echo "Submitted batch job 7"; exit 0; }
[[ ! -f answer ]] || { cat answer >&2; exit 1; }
"""
# One kind of node: four of them, with 40 cores and 8 GPUs each.
SINFO = """#!/bin/bash
[[ ! -f nosinfo ]] || { echo "Unable to contact slurm controller" >&2; exit 1; }
case "$*" in
*--format=%P) printf 'cpu\\ngpu*\\n' ;;
*--format=%D) echo 3; echo 1 ;;
*--format=%c) echo 40 ;;
*--format=%G) echo 'gpu:v100:8(S:0-1)' ;;
*--format=*) echo 4 nodes of 40 CPUs ;;
esac
"""
PROGRAMS = {
    "srun": SRUN,
    "scontrol": SCONTROL,
    "squeue": SQUEUE,
    "sbatch": SBATCH,
    "sinfo": SINFO,
    "sleep": "#!/bin/bash\n",
}


@dataclass(frozen=True)
class Desk:
    """A project folder with the scripts, and programs that stand in for Slurm's."""

    folder: Path

    def script(self, name: str, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
        """Run one of the scripts."""
        job = {"SLURM_JOB_ID": "4107", "SLURM_JOB_NODELIST": "n[1-2]", "SLURM_CPUS_PER_TASK": "6", "USER": "me"}
        environment = {"PATH": f"{self.folder}/bin:/usr/bin:/bin", "HOME": str(self.folder), "WANDB_API_KEY": SECRET}
        command = ["bash", f"launch/slurm/{name}", *arguments]
        return subprocess.run(
            command, cwd=self.folder, env=environment | job | variables, capture_output=True, text=True, timeout=60
        )

    def train(self, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
        """Run train.sh as a job does."""
        return self.script("train.sh", "--ds_config", "a.json", "--run_dir", "run", *arguments, **variables)

    def plan(self, *lines: str, state: str = "RUNNING", batch: str = "1") -> None:
        """What srun does, call by call; what scontrol says of the job."""
        (self.folder / "plan").write_text("\n".join(lines) + "\n", encoding="utf-8")
        (self.folder / "state").write_text(state, encoding="utf-8")
        (self.folder / "batch").write_text(batch, encoding="utf-8")

    def settings(self, *lines: str) -> None:
        """Write site.env."""
        (self.folder / "launch/slurm/site.env").write_text("\n".join(lines) + "\n", encoding="utf-8")

    def program(self, path: str, text: str) -> None:
        """Write a program."""
        target = self.folder / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text, encoding="utf-8")
        target.chmod(0o755)

    def image(self) -> str:
        """Write an image, and an apptainer that prints how it is called."""
        self.program("bin/apptainer", '#!/bin/bash\nprintf "%s\\n" "$@" "CC=$CC CUDA_HOME=$CUDA_HOME"\n')
        (self.folder / "v.sif").touch()
        return str(self.folder / "v.sif")

    @property
    def requeued(self) -> int:
        """How often the job has been requeued."""
        path = self.folder / "requeued"
        return path.read_text(encoding="utf-8").count("requeued") if path.exists() else 0

    @property
    def asked(self) -> list[str]:
        """The words that srun was called with."""
        return (self.folder / "srun.called").read_text(encoding="utf-8").splitlines()
