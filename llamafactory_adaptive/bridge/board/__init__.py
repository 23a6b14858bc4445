"""LLaMA Board, the host's web interface, with ``adaptive`` as a finetuning method.

* ``seams``: the attributes of the host's web interface that are replaced, all or none.
* ``option_fields``: which options there are and what each method reads, generated from the methods' own options.
* ``labels``: the texts of the interface in the languages of the board.
* ``interface``, ``panel``, ``ranks_tab``: the components, and what events do.
* ``runner``, ``saved_settings``: the settings of a run out of the components, and files of settings.
* ``command``, ``plan_preview``, ``exporting``: commands of this package as processes that can be aborted, and that end
  with the board.
* ``training_figure``, ``run_folders``: the figure of a run that trains, and runs that have ended.

Gradio is imported by modules of this package only after the host has imported its own web interface.
"""
