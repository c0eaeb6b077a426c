"""Errors that users and other processes see.

    PilafError
    ├── ConfigError(ValueError)          a setting is wrong; the message says how to mend it
    ├── PlacementError(ValueError)       the cluster has no room for the roles
    ├── ClusterError(RuntimeError)       the cluster cannot be reached, or its nodes do not fit together
    ├── PromptError(ValueError)          a prompt source is empty, unreadable or too long
    ├── ModelError(ValueError)           a model folder is missing or does not fit the others
    │   └── ModelUnavailableError        its URL does not answer now; asking again later may do
    ├── OracleError(RuntimeError)        a preference oracle raised or answered nonsense
    │   └── OracleUnavailableError       it cannot be reached now; asking again later may do
    ├── LedgerError(RuntimeError)        an arrow of a pair's life was taken from the wrong state
    ├── RunFolderError(RuntimeError)     the run folder is in use, missing or foreign
    ├── CheckpointError(RuntimeError)    a checkpoint cannot be written or fails verification
    ├── MirrorError(RuntimeError)        checkpoints cannot be copied to checkpoint.mirror, or fetched from there
    ├── AccessError(ValueError)          a token of the console cannot be issued or revoked
    ├── WeightSyncError(RuntimeError)    new weights did not arrive, or are not what was sent
    ├── RewardModelError(RuntimeError)   the reward model collapsed, diverged or learned the wrong thing
    ├── RoleLostError(RuntimeError)      a role died, does not answer, or failed for no reason of ours
    │   └── RollbackError                a metric passed a limit whose policy is to go back
    ├── PoisonPairError(RuntimeError)    work on a pair keeps killing the replicas that get it
    ├── GivenUpError(RuntimeError)       a role failed too often in a row to be replaced once more
    ├── GuardError(RuntimeError)         a metric passed a limit whose policy is to stop
    ├── PauseError(RuntimeError)         a step cannot be taken, and the policy is to end and go on later
    └── NonFiniteLossError(ArithmeticError)  the loss is NaN or infinite; the batch was saved

Each takes one message and nothing else, so that it pickles across processes.
"""


class PilafError(Exception):
    """Base of every error that this package raises on purpose."""


def first_cause(error: BaseException) -> BaseException:
    """The error that started it, out of the groups that task groups wrap around it."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error


class ConfigError(PilafError, ValueError):
    """A configuration value, or a combination of values, is wrong."""


class PlacementError(PilafError, ValueError):
    """The roles do not fit the cluster; names what is missing and which settings would mend it."""


class ClusterError(PilafError, RuntimeError):
    """The cluster cannot be reached, refuses a job, or its nodes do not fit together."""


class PromptError(PilafError, ValueError):
    """A prompt source is empty, unreadable, or holds prompts that do not fit."""


class ModelError(PilafError, ValueError):
    """A model cannot be found, or does not fit the other models of the run."""


class ModelUnavailableError(ModelError):
    """The file system of a model's URL does not answer, or not with whole files."""


class OracleError(PilafError, RuntimeError):
    """A preference oracle raised, or returned something that is not a preference."""


class OracleUnavailableError(OracleError):
    """A preference oracle cannot answer now (network, overload); a run waits and asks again.

    Oracle functions may raise it themselves; an ``OSError`` of theirs counts as one, too.
    """


class LedgerError(PilafError, RuntimeError):
    """A pair was asked to move along an arrow that its state does not have, or the ledger cannot be written."""


class RunFolderError(PilafError, RuntimeError):
    """The run folder is in use by another run, missing, or not a run folder."""


class CheckpointError(PilafError, RuntimeError):
    """A checkpoint could not be written, or does not verify."""


class MirrorError(PilafError, RuntimeError):
    """The location of ``checkpoint.mirror`` does not answer, or not as it should."""


class AccessError(PilafError, ValueError):
    """A token of the console cannot be issued or revoked; says why."""


class WeightSyncError(PilafError, RuntimeError):
    """New policy weights did not reach a generator intact and in time."""


class RewardModelError(PilafError, RuntimeError):
    """The reward model that trains beside the policy is of no use: collapsed, diverged or worse than chance."""


class RoleLostError(PilafError, RuntimeError):
    """A role died, did not answer in time, or failed in a way that is none of our own errors."""


class PoisonPairError(PilafError, RuntimeError):
    """Replicas die of this work: of a pair, or of one of several pairs that are to be tried one by one."""


class GivenUpError(PilafError, RuntimeError):
    """A role failed so often in a row that it is not replaced again; tells the first cause."""


class RollbackError(RoleLostError):
    """A metric passed a limit whose policy is to go back to the checkpoint, as after a loss of the learner."""


class GuardError(PilafError, RuntimeError):
    """A metric passed a limit whose policy is to stop the run."""


class PauseError(PilafError, RuntimeError):
    """A step cannot be taken, and the guard's policy is to end the run as a request to stop does."""


class NonFiniteLossError(PilafError, ArithmeticError):
    """The loss became NaN or infinite; the offending batch was saved first."""
