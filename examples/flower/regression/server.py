"""The server's app."""

import ergodica as erg
from ergodica.integrations.flower import server_app
from regression.study import study


def show(datatree):
    import arviz

    print(arviz.summary(datatree, round_to=3))
    print("refused:", datatree.attrs["refused"], "left out:", datatree.attrs["left_out"], "ergodica", erg.__version__)


app = server_app(study, on_result=show)
