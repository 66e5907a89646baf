import os
import sys

from benchmarks.gpu import main, stage_process

if "FASTXKD_GPU_JOB" in os.environ:
    stage_process()
else:
    sys.exit(main())
